"""A caption is true of an image iff all that it names agrees: in the rule, CLIP's pairs, mismatches and scores."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ratlip.clip.pairs import PairBatches, caption_facts, group_names, truths
from ratlip.clip.retrieval import retrieval
from ratlip.data import facts, scenes, synthetic
from ratlip.data.facts import FIRST, INVERSE, RELATION, SECOND, UNNAMED
from ratlip.data.generated import GeneratedSet
from ratlip.errors import DataError
from ratlip.training.step import MISMATCH, mismatch


def split_of(records, name="train"):
    """What a prepared split knows of these records."""
    records = [each for each in records if each.split == name]
    names = sorted(records[0].attributes)
    flat = [named for each in records for named in each.named or ()]
    return SimpleNamespace(
        attributes=[each.attributes for each in records],
        captions=[list(each.captions) for each in records],
        all_captions=[text for each in records for text in each.captions],
        caption_offsets=np.cumsum([0, *(len(each.captions) for each in records)]),
        labels=np.array([each.label for each in records]),
        named=np.array([[name in named for name in names] for named in flat]) if flat else None,
        records=records,
    )


SETS = {
    "synthetic": GeneratedSet(synthetic, {}, 16, synthetic.attributes_of_set()),
    "scenes": GeneratedSet(scenes, {}, 24, scenes.attributes_of_set()),
}


@pytest.fixture(scope="module")
def parts():
    """Both sets with captions that name a part: {name: split}."""
    drawn = {"synthetic": synthetic.records(16, 60, 1, named="subset"), "scenes": scenes.records(24, 60, 1)}
    return {name: split_of(records) for name, records in drawn.items()}


def exchanged(attributes):
    """The same image, with the other object first; in words, not in numbers."""
    other = {}
    for name, value in attributes.items():
        role = {FIRST: SECOND, SECOND: FIRST}.get(name[: name.find(" ") + 1])
        other[role + name.split(" ", 1)[1] if role else name] = INVERSE[value] if name == RELATION else value
    return other


def is_true(named, said, shown):
    ways = [shown, exchanged(shown)] if RELATION in shown else [shown]
    return any(all(way[name] == said[name] for name in named) for way in ways)


def expected(split):
    """bool (images, captions), from words."""
    told = [(named, each.attributes) for each in split.records for named in each.named]
    return np.array([[is_true(named, said, shown) for named, said in told] for shown in split.attributes])


@pytest.mark.parametrize("name", ["synthetic", "scenes"])
def test_the_rule_agrees_with_words(parts, name):
    split, right = parts[name], expected(parts[name])
    ((says, shows),) = truths(split)
    found = facts.true_of(says, shows[:, None])
    np.testing.assert_array_equal(found, right)
    own = np.repeat(np.arange(len(split.captions)), 10)
    assert found[own, np.arange(len(own))].all()  # a caption is true of its own image
    assert 0.02 < found.mean() < 0.5
    torch.testing.assert_close(facts.true_of(torch.from_numpy(says), torch.from_numpy(shows)[:, None]).numpy(), found)


def test_captions_hold_the_words_that_are_named_and_no_others(parts):
    for split in parts.values():
        values = facts.values_of([split])
        for record in split.records:
            for text, named in zip(record.captions, record.named, strict=True):
                assert named and set(named) <= set(record.attributes) and "{" not in text and "[" not in text
                padded = f" {text} ".replace(" on the ", " ")
                for name, value in record.attributes.items():
                    others = [record.attributes[n] for n in named if n.split(" ")[-1] == name.split(" ")[-1]]
                    if name in named:
                        assert any(f" {word} " in padded for word in (value, INVERSE.get(value, value))), (text, name)
                    elif value not in others:
                        assert f" {value} " not in padded, (text, name, value)
        assert all(len(each) > 1 for each in values.values())


def test_the_order_of_words_belongs_to_objects(parts):
    """Who is left of whom, and whose colour a colour is, from the text alone."""
    looked = 0
    for record in parts["scenes"].records:
        for text, named in zip(record.captions, record.named, strict=True):
            if {FIRST + "colour", SECOND + "colour", RELATION} <= set(named):
                a, b = (record.attributes[role + "colour"] for role in (FIRST, SECOND))
                word = record.attributes[RELATION]
                text = f" {text} "
                word, a, b = (word, a, b) if word in text else (INVERSE[word], b, a)
                place, first, second = text.index(f" {word} "), text.rindex(f" {a} "), text.rindex(f" {b} ")
                assert first < place < second or place < second < first, text  # "... left of b", "left of b there is a"
                looked += 1
    assert looked > 20


def test_half_of_the_captions_begin_with_either_object(parts):
    begins = [
        text.index(r.attributes[FIRST + "colour"]) < text.index(r.attributes[SECOND + "colour"])
        for r in parts["scenes"].records
        for text, named in zip(r.captions, r.named, strict=True)
        if {FIRST + "colour", SECOND + "colour"} <= set(named)
    ]
    assert 0.3 < np.mean(begins) < 0.7


def test_readings_exchange_the_objects_and_turn_the_relation():
    table = facts.coding(scenes.attributes_of_set())
    shown = [scenes.drawn("train", i) for i in range(20)]
    both = facts.readings(facts.codes(shown, table), table)
    np.testing.assert_array_equal(both[:, 1], facts.codes([exchanged(each) for each in shown], table))
    unknown = facts.readings(np.full((1, len(table)), UNNAMED, np.int16), table)
    assert (unknown == UNNAMED).all()
    with pytest.raises(DataError, match="mauve"):
        facts.codes([{**shown[0], FIRST + "colour": "mauve"}], table)


@pytest.mark.parametrize("name", ["synthetic", "scenes"])
def test_positives_of_a_batch_are_the_captions_that_are_true(parts, name):
    split, right = parts[name], expected(parts[name])
    batches = PairBatches(split, 24, seed=0)
    rows = {text: row for row, text in enumerate(split.all_captions)}
    chosen, captions, found, _ = batches(3)
    np.testing.assert_array_equal(found, right[chosen][:, [rows[text] for text in captions]])
    assert found.diagonal().all() and found.sum() > len(chosen)


def test_hard_negatives_of_scenes_are_the_pairs(parts):
    one_relation = split_of(scenes.records(24, 60, 1, relations=1))
    assert RELATION not in one_relation.attributes[0]
    for split in (parts["scenes"], one_relation):
        batches = PairBatches(split, 24, seed=0)
        chosen = batches(0)[0]
        assert batches.origin == "labels" and (chosen[:12] // 2 == chosen[12:] // 2).all()
        assert (chosen[:12] != chosen[12:]).all()


def test_complete_captions_have_the_positives_of_before():
    split = split_of(synthetic.records(16, 900, 1))
    batches, names = PairBatches(split, 64, seed=1), np.array(group_names(split))
    for step in range(4):
        chosen, _, found, _ = batches(step)
        np.testing.assert_array_equal(found, names[chosen][:, None] == names[chosen])


def old_mismatch(captions, sentences, groups, mode, seed, step, rank=0):
    """As it was when every caption named everything."""
    sentence = sentences[captions]
    rolled = sentence.roll(-1, dims=0)
    if mode != "similar":
        return rolled
    rng = np.random.default_rng([seed, MISMATCH, step, rank])
    pool = torch.from_numpy(rng.integers(0, len(sentences), 256))
    choice = torch.from_numpy(rng.integers(0, 4, (len(captions), 1)))
    normal = torch.nn.functional.normalize
    cosine = normal(sentence, dim=1) @ normal(sentences[pool], dim=1).T
    cosine = cosine.masked_fill(groups[captions][:, None] == groups[pool], -2)
    similarity, nearest = cosine.topk(4, dim=1)
    near, found = pool[nearest.gather(1, choice)].squeeze(1), similarity.gather(1, choice) > -2
    even = torch.arange(len(captions))[:, None] % 2 == 0
    return torch.where(even & found, sentences[near], rolled)


@pytest.mark.parametrize("mode", ["roll", "similar", "published"])
def test_complete_captions_are_mismatched_as_before(mode):
    split = split_of(synthetic.records(16, 900, 1))
    told, sentences = torch.from_numpy(caption_facts(split)), torch.randn(9000, 6)
    groups = np.unique(group_names(split), return_inverse=True)[1].repeat(10)
    for step in range(3):
        captions = torch.from_numpy(np.random.default_rng(step).integers(0, 9000, 16))
        new = mismatch(captions, sentences, told, mode, 0, step)
        assert torch.equal(new, old_mismatch(captions, sentences, torch.from_numpy(groups), mode, 0, step))


@pytest.mark.parametrize("mode,name", list(itertools.product(["roll", "similar"], ["synthetic", "scenes"])))
def test_a_caption_that_is_true_of_the_image_is_never_a_mismatch(parts, mode, name):
    split, right = parts[name], expected(parts[name])
    told, sentences = torch.from_numpy(caption_facts(split)), torch.arange(600.0)[:, None] * torch.ones(3)
    sentences[:, 1:] = torch.randn(600, 2) * 100
    neighbours = 0
    for step in range(12):
        captions = torch.from_numpy(np.random.default_rng(step).integers(0, 600, 16))
        wrong = mismatch(captions, sentences, told, mode, 0, step)[:, 0].long()
        assert not right[captions // 10, wrong].any()
        neighbours += int((wrong == captions.roll(-1)).sum())
    least = 16 * 12 * (0.5 if mode == "roll" else 0.25)
    assert neighbours > least  # the neighbour's, where it is not true


def test_where_the_whole_batch_is_true_the_pool_is_asked(parts):
    split = parts["synthetic"]
    told, right = torch.from_numpy(caption_facts(split)), expected(split)
    row = int(np.flatnonzero(np.arange(600) // 10 == 0)[0])
    wrong = mismatch(torch.tensor([row, row]), torch.arange(600.0)[:, None], told, "roll", 0, 0)[:, 0].long()
    assert not right[0, wrong].any()


def test_retrieval_counts_every_true_caption_as_right(parts):
    split, right = parts["scenes"], expected(parts["scenes"])
    picked = [i * 10 + i % 10 for i in range(60)]

    class Oracle:
        """Embeds image i as its row of truths: a caption's column is its own axis."""

        image_size, mean = 24, torch.zeros(1)

        def __init__(self):
            self.texts = dict.fromkeys(split.captions[i][i % 10] for i in range(60))
            self.place = 0

        def embed_text(self, texts):
            return torch.eye(len(texts))

        def embed_images(self, images):
            rows = right[self.place : self.place + len(images)]
            self.place += len(images)
            columns = [split.all_captions.index(text) for text in self.texts]
            return torch.from_numpy(rows[:, columns]).float() * 0.5 + 1e-3

    class Split(SimpleNamespace):
        def __len__(self):
            return 60

    fake = Split(**vars(split), image=lambda i: split.records[i].pixels)
    found = retrieval(Oracle(), fake)
    assert found["image_to_text"]["R@1"] == 1.0 and "attributes" not in found["image_to_text"]
    share = right[:, picked].mean()
    assert found["image_to_text"]["chance_R@1"] == pytest.approx(share, abs=0.03)


def named_in(made, says):
    """What a row of codes says, in words."""
    return {name: made.table[name][code] for name, code in zip(made.table, says, strict=True) if code != UNNAMED}


@pytest.mark.parametrize("name", SETS)
def test_a_changed_caption_is_wrong_in_one_thing(parts, name):
    made, rng, seen = SETS[name], np.random.default_rng(0), set()
    for known in parts[name].attributes:
        for change in made.changes:
            pair = made.pair(known, change, rng)
            true, false = named_in(made, pair.says), named_in(made, pair.changed_says)
            assert is_true(true, true, known) and not is_true(false, false, known)
            assert pair.caption != pair.changed and true.keys() == false.keys()
            different = [each for each in true if true[each] != false[each]]
            if change == "exchanged":
                assert sorted(true.values()) == sorted(false.values()) and len(different) == 2
            else:
                assert different == [change]
            a, b = pair.caption.split(), pair.changed.split()
            assert len(a) == len(b) or change in ("relation", "place"), (pair.caption, pair.changed)
            seen.add(len(true))
    assert len(seen) >= len(made.values) - 1  # captions of every length, but the shortest where two must be named


def said_by(made, batches):
    """The pairs of step 0, drawn once more as the batch draws them: says of the true ones, then of the changed."""
    drawn, pair = [], made.pair
    object.__setattr__(made, "pair", lambda *given: drawn.append(pair(*given)) or drawn[-1])
    batches(0)
    object.__delattr__(made, "pair")
    return [each.says for each in drawn] + [each.changed_says for each in drawn]


@pytest.mark.parametrize("name", SETS)
def test_a_batch_holds_a_true_and_a_changed_caption_of_each_image(parts, name):
    made, part = SETS[name], parts[name]
    batches = PairBatches(part, 12, seed=3, made=made)
    chosen, captions, found, rng = batches(0)
    assert len(captions) == 24 and captions == batches(0).captions != batches(1).captions
    said = [named_in(made, row) for row in said_by(made, batches)]
    truth = [[is_true(words, words, part.attributes[i]) for words in said] for i in chosen]
    assert found.tolist() == truth
    assert found.diagonal().all() and not found[:, 12:].diagonal().any()
    plain = PairBatches(part, 12, seed=3, hard_negatives=False, made=made)
    assert len(plain(0).captions) == 12  # nothing is changed where no hard negatives are asked for


@pytest.mark.parametrize("name", SETS)
def test_new_captions_are_true_of_no_training_image(parts, name):
    part, table = parts[name], SETS[name].table
    shows = facts.readings(facts.codes(part.attributes[:20], table), table)
    said = facts.says(part, table)
    truth = ~expected(part)[:20].any(axis=0)
    assert 0.1 < truth.mean() < 0.9
    np.testing.assert_array_equal(facts.new(said, shows), truth)
    np.testing.assert_array_equal(facts.new(said[:3], np.repeat(shows, 9000, axis=0)), truth[:3])  # in parts
