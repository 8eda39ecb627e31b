"""The harder generated set: its truth is true, its splits hold, its difficulty follows its settings."""

import collections

import numpy as np
import pytest

from ratlip.data import scenes
from ratlip.data.facts import FIRST, RELATION, SECOND
from ratlip.data.prepared import prepare
from ratlip.data.synthetic import BACKGROUNDS, COLOURS
from ratlip.errors import SettingsError
from ratlip.settings import load_settings
from ratlip.workspace import Workspace

ROLES = (FIRST, SECOND)
SMALL = {"data.train_images": 8, "data.test_images": 3, "data.validation_images": 4}
SMALL |= {"data.resize": 24, "data.crop": 24, "model.image_size": 24}


@pytest.fixture(scope="module")
def drawn():
    """Attributes, pixels and masks of 240 images."""
    found = []
    for i in range(240):
        attributes = scenes.drawn("train", i)
        found.append((attributes, *scenes.render(attributes, 48, np.random.default_rng(i))))
    return found


def test_the_relation_is_where_the_masks_are(drawn):
    for attributes, _, masks in drawn:
        (y1, x1), (y2, x2) = (np.argwhere(mask).mean(axis=0) for mask in masks)
        assert not (masks[0] & masks[1]).any() and masks.any(axis=(1, 2)).all()
        if attributes[RELATION] == "left of":
            assert x2 - x1 > 2 * abs(y2 - y1) and np.flatnonzero(masks[0].any(0))[-1] <= x2
        elif attributes[RELATION] == "above":
            assert y2 - y1 > 2 * abs(x2 - x1)


def test_what_is_in_front_is_whole_and_hides_a_part_of_the_other():
    """Beside the same objects apart: the first loses nothing, the second does, but more than a third of it stays."""
    kept = collections.defaultdict(list)
    for i in range(60):
        attributes = {**scenes.drawn("train", i), RELATION: "in front of"}
        masks = scenes.render(attributes, 48, np.random.default_rng(i))[1]
        areas = {}
        for role, mask in zip(ROLES, masks, strict=True):
            alone = {**attributes, RELATION: "left of"}
            areas[role] = mask.sum() / scenes.render(alone, 48, np.random.default_rng(i))[1][ROLES.index(role)].sum()
        kept["first"].append(areas[FIRST])
        kept["second"].append(areas[SECOND])
    assert np.min(kept["first"]) > 0.8  # other pixels are half covered elsewhere
    assert np.max(kept["second"]) < 0.99 and np.min(kept["second"]) > 0.3


def test_colours_sizes_and_backgrounds_are_what_is_said(drawn):
    areas = collections.defaultdict(list)
    for attributes, pixels, masks in drawn:
        for role, mask in zip(ROLES, masks, strict=True):
            light = pixels[mask].astype(float)
            light = light[light.max(1) >= np.quantile(light.max(1), 0.85)].mean(0)  # without a texture's darker tone
            nearest = min(COLOURS, key=lambda name, at=light: np.abs(np.array(COLOURS[name]) - at).sum())
            assert nearest == attributes[role + "colour"], (attributes, light)
            if attributes[RELATION] != "in front of":
                areas[attributes[role + "shape"], attributes[role + "size"]].append(mask.sum())
        ground = np.median(pixels[~masks.any(0)], axis=0)
        assert min(BACKGROUNDS, key=lambda n, at=ground: np.abs(at - BACKGROUNDS[n]).sum()) == attributes["background"]
    for shape in scenes.SHAPES:
        assert max(areas[shape, "small"]) < min(areas[shape, "large"]), shape


def test_textures_differ_and_plain_is_one_tone(drawn):
    dark = collections.defaultdict(list)
    for attributes, pixels, masks in drawn:
        for role, mask in zip(ROLES, masks, strict=True):
            light = pixels[mask].max(axis=1).astype(float)
            dark[attributes[role + "texture"]].append((light < 0.75 * np.quantile(light, 0.95)).mean())
    means = {name: np.mean(values) for name, values in dark.items()}
    assert set(means) == set(scenes.TEXTURES)
    assert means["plain"] < 0.1 < means["dotted"] < means["striped"] < 0.8


def test_the_kinds_of_a_split_are_in_no_other():
    splits = ("train", "test", "validation")
    attributes = {split: [scenes.drawn(split, i) for i in range(300)] for split in splits}
    kinds = {s: {(a[r + "shape"], a[r + "colour"]) for a in attributes[s] for r in ROLES} for s in splits}
    held = {s: {k for k in kinds[s] if k not in kinds["train"]} for s in splits}
    assert len(held["test"]) == len(held["validation"]) == 8 and not held["test"] & held["validation"]
    for split in ("test", "validation"):
        assert {shape for shape, _ in held[split]} == set(scenes.SHAPES)
        assert all(any((a[r + "shape"], a[r + "colour"]) in held[split] for r in ROLES) for a in attributes[split])
    for split, each in attributes.items():
        assert all(a[FIRST + "colour"] != a[SECOND + "colour"] for a in each)
        for name, values in scenes.attributes_of_set().items():
            assert {a[name] for a in each} == set(values), (split, name)
    assert {scenes.kind_split("disc", c, seed=0) for c in COLOURS} == set(splits)
    other = [c for c in COLOURS if scenes.kind_split("disc", c, seed=1) == "test"]
    assert other != [c for c in COLOURS if scenes.kind_split("disc", c, seed=0) == "test"]


def test_images_of_a_pair_differ_in_one_attribute_or_have_words_exchanged():
    kinds = collections.Counter()
    for i in range(0, 200, 2):
        a, b = scenes.drawn("train", i), scenes.drawn("train", i + 1)
        differ = {name for name in a if a[name] != b[name]}
        own = {name.split(" ", 1)[1] for name in differ if name.startswith(ROLES)}
        if len(differ) == 1:
            kinds["changed"] += 1
        else:
            assert all(a[FIRST + n] == b[SECOND + n] and b[FIRST + n] == a[SECOND + n] for n in own)
            assert differ <= {r + n for r in ROLES for n in own}
            kinds["all" if len(own) > 1 else "one"] += 1
    assert kinds["changed"] > 30 and kinds["one"] > 15 and kinds["all"] > 5


def test_records_are_drawn_again_alike_and_a_longer_set_begins_like_a_shorter_one():
    short, long = list(scenes.records(24, 6, 3, 2, 2)), list(scenes.records(24, 9, 4, 2, 3))
    by_key = {record.key: record for record in long}
    assert [r.split for r in short] == ["train"] * 6 + ["test"] * 3 + ["validation"] * 2
    for record in short:
        other = by_key[record.key]
        np.testing.assert_array_equal(record.pixels, other.pixels)
        np.testing.assert_array_equal(record.mask, other.mask)
        assert (record.captions, record.named, record.attributes) == (other.captions, other.named, other.attributes)
    assert [r.label for r in short] == [0, 0, 1, 1, 2, 2, -1, -1, -1, -1, -1]
    assert not np.array_equal(next(scenes.records(24, 1, 1, 3)).pixels, short[0].pixels)
    with pytest.raises(SettingsError, match="data.resize=16.*24 px"):
        next(scenes.records(16))


def test_settings_make_the_set_easier():
    used = dict(shapes=2, colours=4, textures=1, sizes=1, backgrounds=1, relations=1)
    assert set(scenes.attributes_of_set(**used)) == {f"{r}{n}" for r in ROLES for n in ("shape", "colour")}
    for record in scenes.records(24, 20, 4, 0, 4, **used):
        assert len(record.attributes) == 4
        assert {record.attributes[r + "shape"] for r in ROLES} <= {"disc", "square"}
        assert {record.attributes[r + "colour"] for r in ROLES} <= set(list(COLOURS)[:4])
        words = " ".join(record.captions)
        assert not any(word in words for word in ("large", "striped", "left of", "white", "navy"))


def test_prepared_scenes_keep_what_captions_name_and_have_a_validation_split(tmp_path):
    workspace = Workspace.of(load_settings("scenes", SMALL), tmp_path, progress=False)
    prepared, expected = workspace.prepared, list(scenes.records(24, 8, 3, 0, 4))
    assert (len(prepared.train), len(prepared.test), len(prepared.validation)) == (8, 3, 4)
    assert prepared["validation"].keys == [r.key for r in expected if r.split == "validation"]
    names = sorted(expected[0].attributes)
    want = [[name in each for name in names] for r in expected if r.split == "train" for each in r.named]
    np.testing.assert_array_equal(prepared.train.named, want)
    again = prepare(scenes.records(24, 8, 3, 0, 4), tmp_path / "b", resize=24, settings={}, source="x", progress=False)
    assert again.manifest["content_sha256"] == prepared.manifest["content_sha256"]
    assert prepared.manifest["counts"] == {"train": 8, "test": 3, "validation": 4}
