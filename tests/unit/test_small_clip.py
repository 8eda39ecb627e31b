"""The small CLIP: what it is trained on, that it learns, resumes and repeats; retrieval; cached captions."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ratlip.clip import small
from ratlip.clip.loading import build_small_clip, load_clip
from ratlip.clip.pairs import PairBatches, caption_facts, neighbourhoods
from ratlip.clip.retrieval import centre_square, embed_captions, retrieval
from ratlip.clip.small import contrastive_loss, learning_rate, train_small_clip
from ratlip.errors import DataError, RunError, WeightsError
from ratlip.fast.tower import FrozenAttention, accelerate_tower
from ratlip.settings import ClipSettings

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
PLACES = {"left": slice(0, 6), "right": slice(10, 16)}


class FakeSplit:
    """Coloured bars on black, 16 px: two attributes, three wordings each."""

    def __init__(self, n, seed, attributes=True):
        kinds = [dict(zip(("colour", "place"), kind, strict=True)) for kind in itertools.product(COLOURS, PLACES)]
        rng = np.random.default_rng(seed)
        truth = [kinds[i % len(kinds)] for i in range(n)]
        self.pixels = rng.integers(0, 30, (n, 16, 16, 3), dtype=np.uint8)
        for picture, kind in zip(self.pixels, truth, strict=True):
            picture[rng.integers(0, 4) :, PLACES[kind["place"]]] += np.array(COLOURS[kind["colour"]], np.uint8)
        self.captions = [
            [
                f"a {k['colour']} bar on the {k['place']}",
                f"{k['place']} there is a {k['colour']} bar",
                f"this bar is {k['colour']} , at the {k['place']}",
            ]
            for k in truth
        ]
        self.all_captions = list(itertools.chain(*self.captions))
        self.caption_offsets = np.arange(n + 1) * 3
        self.labels = np.array([list(COLOURS).index(k["colour"]) for k in truth])
        self.attributes = truth if attributes else None
        self.keys = [str(i) for i in range(n)]

    def __len__(self):
        return len(self.pixels)

    def image(self, i):
        return self.pixels[i]


def fake(n=48, attributes=True):
    return SimpleNamespace(
        train=FakeSplit(n, 0, attributes),
        test=FakeSplit(12, 1, attributes),
        manifest={"content_sha256": f"{n}{attributes}", "resize": 16},
        folder="fake",
    )


def settings(**fields):
    small = {
        "patch_size": 4,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "text_width": 32,
        "text_layers": 1,
        "text_heads": 2,
        "embed_dim": 16,
        "context_length": 12,
        "steps": 6,
        "batch_size": 12,
        "lr": 3e-3,
        "warmup": 3,
    }
    return ClipSettings(**{"source": "train", **small, **fields})


def train(folder, prepared=None, size=16, **fields):
    return train_small_clip(prepared or fake(), settings(**fields), folder, image_size=size, progress=False)


# --------------------------------------------------------------------------------------- what it learns from


def test_loss_without_other_positives_is_clips():
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    logits, own, entropy = 10 * a @ b.T, torch.arange(5), torch.nn.functional.cross_entropy
    expected = (entropy(logits, own) + entropy(logits.T, own)) / 2
    torch.testing.assert_close(contrastive_loss(a, b, torch.tensor(10.0), torch.eye(5) > 0), expected)


def test_pairs_of_one_group_are_not_pushed_apart():
    same = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    positives = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    loss = contrastive_loss(same, same, torch.tensor(50.0), positives)
    assert loss.item() == pytest.approx(2 / 3 * math.log(2), abs=1e-5)  # the least that equal targets allow
    wrong = contrastive_loss(same, same, torch.tensor(50.0), torch.eye(3, dtype=torch.bool))
    assert wrong.item() == pytest.approx(loss.item(), abs=1e-5)
    x = same.clone().requires_grad_()
    contrastive_loss(x, same, torch.tensor(50.0), positives).backward()
    assert x.grad.abs().max() < 1e-5


def test_batches_depend_on_seed_and_step_only():
    split = fake().train
    one, other = (PairBatches(split, 8, seed=3) for _ in range(2))
    other(7)
    for step in (0, 5):
        (a, texts, *_), (b, again, *_) = one(step), other(step)
        assert a.tolist() == b.tolist() and texts == again
    assert one(0)[0].tolist() != one(1)[0].tolist() != PairBatches(split, 8, seed=4)(1)[0].tolist()
    assert all(text in split.captions[i] for i, text in zip(*one(0)[:2], strict=True))


def test_hard_negatives_differ_in_one_attribute():
    split = fake().train
    batches = PairBatches(split, 24, seed=0)
    assert batches.origin == "attributes" and len(neighbourhoods(split)) == 2
    for step in range(5):
        chosen = batches(step)[0]
        for first, second in zip(chosen[:12], chosen[12:], strict=True):
            a, b = split.attributes[first], split.attributes[second]
            assert sum(a[key] != b[key] for key in a) == 1


def test_hard_negatives_without_attributes_are_of_the_same_class():
    split = fake(attributes=False).train
    batches = PairBatches(split, 25, seed=0)
    chosen = batches(0)[0]
    assert batches.origin == "labels" and len(chosen) == 25
    assert (split.labels[chosen[:12]] == split.labels[chosen[13:]]).all()
    assert (batches.group[chosen[:12]] != batches.group[chosen[13:]]).all()
    split.labels = np.full(len(split), -1)
    assert PairBatches(split, 8, seed=0).origin == "none"
    assert PairBatches(fake().train, 8, seed=0, hard_negatives=False).origin == "none"


def test_complete_captions_say_their_images_group():
    split = fake(n=12).train  # 6 kinds of bar, each twice, three captions each
    facts = caption_facts(split)
    assert facts.shape == (36, 2, 1) and (facts[:, 0] == facts[:, 1]).all()
    numbers = facts[:, 0, 0]
    assert len(set(numbers)) == 6
    assert (numbers[:18] == numbers[18:]).all() and (numbers.reshape(12, 3) == numbers[::3, None]).all()


def test_an_image_without_neighbours_gets_any_image():
    split = fake(n=2, attributes=False).train
    split.labels = np.array([0, 1])
    assert set(PairBatches(split, 8, seed=0)(0)[0]) <= {0, 1}


def test_batch_larger_than_the_data():
    assert len(PairBatches(fake(n=6).train, 32, seed=0)(0)[0]) == 32


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, 100, 10, 1.0) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[-1] < 0.001
    assert learning_rate(0, 1, 0, 1.0) == 1.0


# -------------------------------------------------------------------------------------------------- training


def test_learns_colour_and_place(tmp_path):
    prepared = fake()
    clip = train(tmp_path, prepared, steps=150)
    scores = retrieval(clip, prepared.test)
    assert scores["image_to_text"]["attributes"] == {"colour": 1.0, "place": 1.0}
    assert scores["image_to_text"]["R@1"] == scores["text_to_image"]["R@1"] == 1.0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [25, 50, 75, 100, 125, 150]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert set(rows[0]) == {"step", "loss", "lr", "logit_scale", "images_per_s"}
    assert not any(p.requires_grad for p in clip.parameters()) and not clip.training


def test_writes_what_load_clip_reads(tmp_path):
    clip = train(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "arch.json",
        "clip.safetensors",
        "manifest.json",
        "metrics.jsonl",
        "settings.json",
        "vocabulary.json",
    ]
    again = load_clip(settings(), tmp_path)
    assert again.fingerprint == clip.fingerprint and again.name == f"small CLIP {clip.fingerprint[:6]}"
    assert torch.equal(again.embed_text(["a red bar"]), clip.embed_text(["a red bar"]))
    assert again.unknown_words("a red zebra") == ["zebra"]
    with pytest.raises(WeightsError, match=r"width 32 instead of 64"):
        load_clip(settings(width=64), tmp_path)


def test_same_seed_same_weights(tmp_path):
    before = torch.random.get_rng_state()
    first, second = (train(tmp_path / name) for name in "ab")
    assert first.fingerprint == second.fingerprint
    assert train(tmp_path / "c", seed=1).fingerprint != first.fingerprint
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_towers_fast_form_learns_from_the_same_gradients():
    torch.manual_seed(0)
    model = build_small_clip(16, **{name: getattr(settings(), name) for name in small.ARCHITECTURE}, vocab_size=9)
    images, tokens = torch.randn(4, 3, 16, 16), torch.randint(1, 8, (4, 12))
    found = []
    for on in (False, True):
        for tower in (model.visual, model):
            accelerate_tower(tower, on)
        assert isinstance(model.transformer.resblocks[0].attn, FrozenAttention) == on
        model.zero_grad()
        contrastive_loss(*model(images, tokens), torch.eye(4) > 0).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda said, name=name: f"{name}: {said}")
    assert all(gradient.abs().max() > 0 for name, gradient in found[0].items() if "attn.in_proj_weight" in name)


@pytest.mark.parametrize("how", [{}, {"optimiser": "muon"}, {"masked": 0.5}])
def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, monkeypatch, how):
    monkeypatch.setattr(small, "CHECKPOINT_EVERY", 4)
    monkeypatch.setattr(small, "LOG_EVERY", 2)
    whole = train(tmp_path / "whole", steps=10, **how)
    real, seen = PairBatches.__call__, []

    def interrupted(self, step):
        seen.append(step)
        if step == 7 and seen.count(7) == 1:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(PairBatches, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", steps=10, **how)
    with pytest.raises(WeightsError, match="no small CLIP was trained here to the end"):
        load_clip(settings(steps=10, **how), tmp_path / "cut")
    seen.append(7)
    resumed = train(tmp_path / "cut", steps=10, **how)
    assert seen[-6:] == [4, 5, 6, 7, 8, 9]
    assert resumed.fingerprint == whole.fingerprint
    for name in ("whole", "cut"):
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert not (tmp_path / "cut" / "training.pt").exists()


def test_muon_learns_the_matrices_of_the_blocks_and_nothing_else(tmp_path):
    model = build_small_clip(16, **{name: getattr(settings(), name) for name in small.ARCHITECTURE}, vocab_size=9)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    adamw, muon = small._optimizers(model, settings(optimiser="muon"))
    groups = [{names[id(p)] for p in group["params"]} for each in (adamw, muon) for group in each.param_groups]
    assert sum(map(len, groups)) == len(names) == len(set.union(*groups))  # each of them once
    assert "visual.transformer.resblocks.1.mlp.c_fc.weight" in groups[2] and "visual.proj" in groups[0]
    assert {name for name in groups[2] if "bias" in name or "resblocks" not in name} == set()
    one = train(tmp_path / "one", optimiser="muon")
    assert one.fingerprint != train(tmp_path / "other").fingerprint
    assert "optimiser" not in json.loads((tmp_path / "other/settings.json").read_text())["settings"]  # as before it
    with pytest.raises(WeightsError, match="optimiser"):
        train(tmp_path / "one")


def test_masked_steps_see_some_of_the_patches_and_the_last_ones_all(tmp_path, monkeypatch):
    seen = []
    real = small.contrastive_loss
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[1]) if type(module).__name__ == "Transformer" else None
    )
    monkeypatch.setattr(small, "contrastive_loss", lambda *a: (seen.append("step"), real(*a))[1])
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    masked = train(tmp_path / "masked", steps=5, masked=0.5)
    hook.remove()
    steps = [list(group) for last, group in itertools.groupby(seen, lambda each: each == "step") if not last]
    assert [tokens[0] for tokens in steps[:5]] == [9, 9, 9, 9, 17]  # the class token, and 8 or 16 patches
    assert masked.fingerprint != train(tmp_path / "whole", steps=5).fingerprint
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    clip = train(tmp_path)
    monkeypatch.setattr(small, "_fit", lambda *a: pytest.fail("trained again"))
    assert train(tmp_path).fingerprint == clip.fingerprint


def test_a_folder_of_another_training_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(WeightsError, match=r"lr 0.003 instead of 0.001"):
        train(tmp_path, lr=1e-3)
    with pytest.raises(WeightsError, match="data 48True instead of 24True"):
        train(tmp_path, fake(n=24))


def test_damaged_files_are_named(tmp_path):
    train(tmp_path)
    weights = (tmp_path / "clip.safetensors").read_bytes()
    (tmp_path / "clip.safetensors").write_bytes(weights[:-40] + b"\1" * 40)
    with pytest.raises(WeightsError, match="not the file that was trained"):
        load_clip(settings(), tmp_path)
    (tmp_path / "clip.safetensors").write_bytes(weights[:1000])
    with pytest.raises(WeightsError, match="damaged"):
        load_clip(settings(), tmp_path)


def test_damaged_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(small, "save_file", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    (tmp_path / "training.pt").write_bytes(b"no checkpoint")
    with pytest.raises(WeightsError, match="training.pt is damaged"):
        train(tmp_path)


def test_images_smaller_than_the_crop_are_refused(tmp_path):
    with pytest.raises(DataError, match="data.crop"):
        train(tmp_path, size=32)


def test_a_diverged_training_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(small, "contrastive_loss", lambda a, *rest: a.sum() * torch.nan)
    with pytest.raises(RunError, match="lower clip.lr"):
        train(tmp_path)


def test_crop_resize_and_flip():
    split = FakeSplit(2, 0)
    split.pixels = np.zeros((2, 16, 16, 3), np.uint8)
    split.pixels[:, :, 8:] = 255
    rng = np.random.default_rng(0)
    whole = small._crops(split, np.array([0, 1]), 16, 16, False, rng)
    assert whole.shape == (2, 3, 16, 16) and whole[..., :8].eq(-1).all() and whole[..., 8:].eq(1).all()
    one = np.array([0])
    corners = [small._crops(split, one, 16, 8, True, rng)[0, 0, 0, 0].item() for _ in range(20)]
    assert set(corners) == {-1.0, 1.0}
    assert len({small._crops(split, one, 8, 8, False, rng).mean().item() for _ in range(20)}) > 3


# ------------------------------------------------------------------------------------------------- retrieval


class KnowingClip:
    """Embeds an image by its colour and place, a caption by the words; `blind` to the place if asked."""

    image_size, embed_dim, mean, fingerprint = 16, 5, torch.zeros(1), "abc"

    def __init__(self, blind=False):
        self.blind = blind
        self.embedded = 0

    def embed_images(self, images):
        colour = images.amax((2, 3)).argmax(1)
        right = (images[..., 8:].mean((1, 2, 3)) > images[..., :8].mean((1, 2, 3))).long()
        return self._code(colour, right)

    def embed_text(self, texts):
        self.embedded += len(texts)
        colour = [next(i for i, c in enumerate(COLOURS) if c in text) for text in texts]
        return self._code(torch.tensor(colour), torch.tensor([int("right" in text) for text in texts]))

    def _code(self, colour, right):
        one_hot = torch.nn.functional.one_hot
        return torch.cat([one_hot(colour, 3), one_hot(right, 2) * (not self.blind)], dim=1).float()


def test_retrieval_of_a_clip_that_knows():
    split = fake().test
    scores = retrieval(KnowingClip(), split)
    assert (scores["images"], scores["captions"], scores["distractors"]) == (12, 6, 0)
    for way in ("image_to_text", "text_to_image"):
        assert scores[way]["R@1"] == scores[way]["R@10"] == scores[way]["median_rank"] == 1
        assert scores[way]["attributes"] == {"colour": 1.0, "place": 1.0}
        assert scores[way]["chance_attributes"] == pytest.approx({"colour": 1 / 3, "place": 1 / 2}, abs=1e-5)
        assert scores[way]["chance_R@1"] == pytest.approx(1 / 6, abs=1e-5)


def test_retrieval_counts_ties_as_wrong():
    split = fake().test
    scores = retrieval(KnowingClip(blind=True), split)
    assert scores["image_to_text"]["R@1"] == 0  # each place ties with the other
    assert scores["image_to_text"]["attributes"]["colour"] == 1.0
    assert scores["image_to_text"]["median_rank"] == 1 + scores["captions"] // 6


def test_retrieval_with_distractors_and_without_attributes():
    data = fake(attributes=False)
    for i, held in enumerate(data.train.captions):
        data.train.captions[i] = [f"{text} , as I see it" for text in held]
    scores = retrieval(KnowingClip(), data.test, distractors=data.train)
    assert scores["distractors"] > 0 and "attributes" not in scores["image_to_text"]
    assert scores["image_to_text"]["R@1"] == 0  # the distractors are as near, and not known to be true
    assert scores["text_to_image"]["R@1"] == 1.0  # no image was added
    assert retrieval(KnowingClip(), data.test)["image_to_text"]["R@1"] == 1.0


def test_centre_square():
    image = np.zeros((16, 24, 3), np.uint8)
    image[:, 4:20] = 255
    assert centre_square(image, 16).shape == (1, 3, 16, 16) and centre_square(image, 16).eq(1).all()
    assert centre_square(image, 8).shape == (1, 3, 8, 8)


# ------------------------------------------------------------------------------------------- cached captions


def test_caption_embeddings_are_cached(tmp_path):
    prepared, clip = fake(), KnowingClip()
    arrays = embed_captions(clip, prepared, tmp_path, progress=False)
    for name, split in (("train", prepared.train), ("test", prepared.test)):
        assert arrays[name].dtype == np.float32
        assert np.array_equal(arrays[name], KnowingClip().embed_text(split.all_captions).numpy())
    assert clip.embedded == 2 * 18  # distinct ones only
    assert np.array_equal(embed_captions(clip, prepared, tmp_path, progress=False)["train"], arrays["train"])
    assert clip.embedded == 36
    assert [p.name for p in tmp_path.iterdir()] == ["captions-48True-abc"]


def test_caption_embeddings_follow_data_and_weights(tmp_path):
    clip = KnowingClip()
    embed_captions(clip, fake(), tmp_path, progress=False)
    embed_captions(clip, fake(n=24), tmp_path, progress=False)
    other = KnowingClip()
    other.fingerprint = "def"
    embed_captions(other, fake(), tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 3 and other.embedded == 36


def test_damaged_caption_embeddings_are_made_again(tmp_path):
    prepared, clip = fake(), KnowingClip()
    good = embed_captions(clip, prepared, tmp_path, progress=False)["train"].copy()
    path = next(tmp_path.glob("captions-*/train-*/embedding.npy"))
    cut, short = lambda: path.write_bytes(path.read_bytes()[:200]), lambda: np.save(path, good[:3])
    for damage in (cut, short, path.unlink):
        damage()
        assert np.array_equal(embed_captions(clip, prepared, tmp_path, progress=False)["train"], good)
