"""Scores in which z counts: 0 where it is ignored, 1 for real renders; the gate; right means right in what is named."""

import json

import numpy as np
import pytest
import torch

from ratlip.data import facts, scenes
from ratlip.data.batches import real_images
from ratlip.data.facts import FIRST, RELATION, UNNAMED
from ratlip.data.generated import generated_set
from ratlip.errors import DataError
from ratlip.scores import gate
from ratlip.scores.diversity import against_fresh, diversity, diversity_of, entropies, open_captions, spread_inside
from ratlip.scores.evaluation import test_pairs as pairs_of_test
from ratlip.scores.judge import best_readings, judge_captions, judge_codes, judge_right
from ratlip.settings import load_settings
from ratlip.workspace import Workspace

CUT = dict(crop=16, image_size=16)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A small set at 16 px whose captions name a part, enough for a judge that knows what it sees."""
    given = {"data.train_images": 840, "data.test_images": 120, "data.named": "subset", "evaluation.judge_steps": 150}
    return Workspace.of(load_settings("smoke", given), tmp_path_factory.mktemp("subset"), progress=False)


@pytest.fixture(scope="module")
def material(workspace):
    """The set, what 12 test captions say, and the judge."""
    made, test = generated_set(workspace.prepared), workspace.prepared.test
    rows = open_captions(test, made, 12)
    return made, facts.says(test, made.table)[rows], workspace.judge


def test_entropy_and_coverage():
    assert entropies(np.array([2] * 64), 8) == (0.0, 1 / 8)
    assert entropies(np.arange(64) % 8, 8) == (pytest.approx(1.0), 1.0)
    assert entropies(np.arange(64) % 2, 8) == (pytest.approx(1 / 3), 1 / 4)
    assert entropies(np.array([UNNAMED, 1, UNNAMED, 0]), 2) == (pytest.approx(1.0), 1.0)  # no object: not counted
    assert entropies(np.full(4, UNNAMED), 2) == (0.0, 0.0)
    assert entropies(np.array([0, 1]), 8)[0] == pytest.approx(1.0)  # two images cannot show more than two values


def test_spread_is_the_distance_from_the_mean():
    images = torch.zeros(2, 3, 4, 4)
    assert spread_inside(images) == 0
    images[1] = 2.0
    assert spread_inside(images) == pytest.approx(2**0.5)  # unbiased: (1 + 1) / 1
    assert spread_inside(torch.randn(4000, 3, 4, 4) * 0.5) == pytest.approx(0.5, rel=0.02)


def test_captions_that_leave_something_open_are_found(workspace, material):
    made, says, _ = material
    assert says.shape == (12, 5) and (says == UNNAMED).any(axis=1).all() and (says != UNNAMED).any(axis=1).all()
    whole = type(workspace.prepared.test)(workspace.prepared.folder, "test")
    whole.named = None
    with pytest.raises(DataError, match="data.named: subset"):
        open_captions(whole, made, 4)


def test_fresh_images_are_what_their_caption_says_and_nothing_more(material):
    made, says, _ = material
    rows = np.repeat(says, 64, axis=0)
    images, attributes = made.fresh(rows, 0, **CUT)
    codes = facts.codes(attributes, made.table)
    assert images.shape == (768, 3, 16, 16) and -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1
    assert ((rows == UNNAMED) | (rows == codes)).all()
    open_ = [codes[i * 64 : (i + 1) * 64, k] for i, k in zip(*np.nonzero(says == UNNAMED), strict=True)]
    assert np.mean([len(set(each)) > 1 for each in open_]) == 1
    again, other = made.fresh(rows[64:70], 0, **CUT, numbers=range(64, 70))[0], made.fresh(rows[:6], 1, **CUT)[0]
    assert torch.equal(again, images[64:70]) and not torch.equal(other, images[:6])


def test_fresh_scenes_are_true_to_their_caption(tmp_path):
    size = {"data.resize": 24, "data.crop": 24, "model.image_size": 24, "data.scenes": {"shapes": 3, "textures": 1}}
    counts = {"data.train_images": 40, "data.test_images": 4, "data.validation_images": 0}
    made = generated_set(Workspace.of(load_settings("scenes", size | counts), tmp_path, progress=False).prepared)
    split = Workspace.of(load_settings("scenes", size | counts), tmp_path, progress=False).prepared.train
    assert len(made.values[FIRST + "shape"]) == 3 and FIRST + "texture" not in made.values
    says = facts.says(split, made.table)
    _, attributes = made.fresh(says, 5, crop=24, image_size=24)
    shows = facts.readings(facts.codes(attributes, made.table), made.table)
    assert facts.true_of(says, shows).all() and not facts.agrees(says, shows)[:, 0].all()


def test_real_renders_get_the_diversity_of_real_renders(material):
    made, says, judge = material

    def renders(i):
        return made.fresh(np.repeat(says[i : i + 1], 64, axis=0), 9, **CUT, numbers=range(i * 64, i * 64 + 64))[0]

    found = diversity(renders, judge, made, says, **CUT)
    for name, ratio in found["ratio"].items():
        assert 0.93 < ratio < 1.07, name
    assert found["real"]["right"] > 0.8 and found["real"]["object"] > 0.95 and found["real"]["entropy"] > 0.85
    assert set(found["real"]["attributes"]) == {"object", "colour", "size", "place", "background"}


def test_a_generator_that_ignores_z_gets_none(material):
    made, says, judge = material
    images = made.fresh(says, 9, **CUT)[0]
    found = diversity(lambda i: images[i : i + 1].expand(64, -1, -1, -1), judge, made, says, **CUT)
    assert found["ratio"]["entropy"] == 0 and found["ratio"]["spread"] == 0 and found["ratio"]["coverage"] < 0.6
    assert found["generated"]["right"] > 0.7


def test_a_generator_that_ignores_the_caption_is_diverse_and_wrong(material):
    made, says, judge = material
    nothing = np.full((64, 5), UNNAMED)
    found = diversity(lambda i: made.fresh(nothing, i, **CUT)[0], judge, made, says, **CUT)
    assert found["ratio"]["entropy"] > 0.9 and found["generated"]["right"] < 0.45


def test_the_captions_of_a_generator_reach_it_with_the_same_latents(workspace, material):
    """A "generator" that draws what the first number of z says: 64 images a caption, whose spread is that of z."""
    _, _, judge = material

    class Grey(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

        def forward(self, latent, sentence):
            self.seen.append((latent, sentence))
            return latent[:, :1, None, None].tanh().expand(-1, 3, 16, 16)

    grey, settings = Grey(), workspace.settings
    found = diversity_of(grey, workspace.clip, workspace.prepared, judge, settings, captions=3)
    assert found["captions"] == len(grey.seen) == 3 and found["generated"]["object"] < 0.2
    assert torch.equal(grey.seen[0][0], grey.seen[1][0]) and grey.seen[0][0].shape == (64, settings.model.latent_size)
    assert (grey.seen[0][1] == grey.seen[0][1][0]).all() and not torch.equal(grey.seen[0][1], grey.seen[1][1])
    assert found["generated"]["spread"] == pytest.approx(float(grey.seen[0][0][:, 0].tanh().std()), rel=1e-3)


def test_shapeless_pictures_are_right_in_nothing(material):
    made, says, judge = material
    images = gate.blurred(made.fresh(np.repeat(says, 4, axis=0), 9, **CUT)[0], np.full(48, 0.25))
    found = judge_codes(judge, images)
    assert (found == UNNAMED).all(axis=1).mean() > 0.85
    assert judge_captions(judge, images, np.repeat(says, 4, axis=0)).all(axis=1).mean() < 0.1


def test_the_gate_is_measured_on_pictures_it_was_not_trained_on(workspace):
    test = workspace.prepared.test
    passed = gate.shares_passed(workspace.judge.gate, real_images(test, range(len(test)), 16, 16))
    assert passed["real"] > 0.95 and set(passed) == {"real", *gate.CONTROLS, *gate.UNSEEN}
    assert all(share < 0.15 for kind, share in passed.items() if kind != "real"), passed
    said = json.loads((workspace.judge_folder / "judge.json").read_text())["object_found_in"]
    assert said["real"] == passed["real"]


def test_controls_have_no_object_and_keep_their_colours(workspace):
    test, rng = workspace.prepared.test, np.random.default_rng(0)
    images = real_images(test, range(32), 16, 16)
    for name, make in (gate.CONTROLS | gate.UNSEEN).items():
        made = make(images, rng)
        assert made.shape == images.shape and torch.isfinite(made).all(), name
        if name in ("shuffled", "random phases", "blurred"):
            assert (made.mean((2, 3)) - images.mean((2, 3))).abs().max() < 0.2, name
    shuffled = gate.CONTROLS["shuffled"](images, rng)
    assert torch.equal(shuffled.flatten(2).sort(2).values, images.flatten(2).sort(2).values)


def test_only_what_is_named_can_be_wrong(material):
    made, says, judge = material
    images, attributes = made.fresh(np.tile(says[:1], (64, 1)), 9, **CUT)
    codes, (column, *_) = facts.codes(attributes, made.table), np.flatnonzero(says[0] == UNNAMED)
    partial = np.tile(says[0], (64, 1))
    right = judge_captions(judge, images, partial)
    assert right[:, column].all() and right.all(axis=1).mean() > 0.8
    partial[:, column] = (codes[:, column] + 1) % len(list(made.table.values())[column])
    assert judge_captions(judge, images, partial)[:, column].mean() < 0.2


def test_two_objects_are_right_in_the_better_reading():
    values = scenes.attributes_of_set()
    table, shown = facts.coding(values), [scenes.drawn("train", i) for i in range(8)]
    own = facts.codes(shown, table)
    other = facts.readings(own, table)[:, 1]
    for says in (own, other):
        best, agreed = best_readings(own, says, values)
        assert agreed.all() and (best == says).all()
    wrong = other.copy()
    wrong[:, list(table).index(RELATION)] = UNNAMED
    wrong[:, 0] = (wrong[:, 0] + 1) % 8
    agreed = best_readings(own, wrong, values)[1]
    assert (agreed.sum(axis=1) == len(table) - 1).all() and not agreed[:, 0].any()


def test_a_run_is_scored_in_what_its_captions_name(workspace):
    workspace.train(accelerator="cpu")
    scores = workspace.evaluate()
    test = workspace.prepared.test
    numbers, captions = pairs_of_test(workspace.prepared, 48)
    images = real_images(test, numbers, 16, 16)
    right = judge_right(workspace.judge, images, [test.attributes[i] for i in numbers])
    rows = [test.caption_offsets[i] + test.captions[i].index(text) for i, text in zip(numbers, captions, strict=True)]
    for column, name in enumerate(sorted(right)):
        named = test.named[rows][:, column]
        assert 5 < named.sum() < 45
        assert scores["real"]["judge"][name] == pytest.approx(right[name].numpy()[named].mean(), abs=1e-4)
    every = np.stack([right[name].numpy() for name in sorted(right)], axis=1)
    assert scores["real"]["judge_all"] == pytest.approx((every | ~test.named[rows]).all(axis=1).mean(), abs=1e-4)
    assert scores["judge_all"] < 0.3 and scores["diversity"]["captions"] == 32
    assert scores["fresh"]["generated"]["frechet_distance"] > scores["fresh"]["real"]["frechet_distance"]
    assert scores["diversity"] == workspace.evaluate()["diversity"]


class Pixels:
    """A stand-in for an extractor: 4 x 4 pixels as features, others as logits."""

    key, widths = "pixels", {"features": 8, "logits": 8}

    def __call__(self, images):
        small = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return {"features": small[:, :8].numpy(), "logits": small[:, 8:16].numpy()}


def test_real_renders_are_as_far_from_fresh_ones_as_others_are(workspace, material, tmp_path):
    made, says, _ = material
    rows = np.tile(says, (20, 1))
    images, read = made.fresh(rows, 77, **CUT)[0], Pixels()
    how = dict(prepared=workspace.prepared, says=rows, **CUT, progress=False)
    near = against_fresh(tmp_path, read, read(images), **how)
    assert len(list(tmp_path.glob("fresh-*"))) == 2
    far = against_fresh(tmp_path, read, read(images * 0.5), **how)
    assert len(list(tmp_path.glob("fresh-*"))) == 2  # kept, and used again
    assert near["real"] == far["real"] and set(near["real"]) == set(near["generated"])
    assert near["generated"]["frechet_distance"] < 3 * near["real"]["frechet_distance"] + 1e-3
    assert far["generated"]["frechet_distance"] > 5 * near["generated"]["frechet_distance"]
    assert near["generated"]["recall"] > 0.7 > far["generated"]["recall"]
