"""The generated set: its truth is true, and its split holds."""

import itertools

import numpy as np
import pytest

from ratlip.data import synthetic
from ratlip.data.synthetic import ATTRIBUTES, BACKGROUNDS, COLOURS, PLACES, SIZES, caption, combinations, records
from ratlip.errors import SettingsError


@pytest.fixture(scope="module")
def drawn():
    """Every combination of both splits once, at the size of the demo."""
    return list(records(32, train_images=840, test_images=120, seed=0))


def test_the_same_seed_draws_the_same_set_and_another_seed_another():
    one, again, other = (list(records(16, 20, 5, seed)) for seed in (3, 3, 4))
    for a, b in zip(one, again, strict=True):
        assert a.key == b.key and a.captions == b.captions and a.attributes == b.attributes
        np.testing.assert_array_equal(a.pixels, b.pixels)
        np.testing.assert_array_equal(a.mask, b.mask)
    assert not all(np.array_equal(a.pixels, b.pixels) for a, b in zip(one, other, strict=True))
    assert [a.attributes for a in one] != [b.attributes for b in other]


def test_a_longer_set_starts_like_a_shorter_one():
    short, long = list(records(16, 10, 4, 0)), list(records(16, 25, 9, 0))
    by_key = {record.key: record for record in long}
    assert len(long) == 34 and len(by_key) == 34
    for record in short:
        np.testing.assert_array_equal(record.pixels, by_key[record.key].pixels)
        assert record.attributes == by_key[record.key].attributes


def test_two_images_of_one_combination_are_not_the_same_image():
    train = [record for record in records(16, 841, 1, 0) if record.split == "train"]
    assert train[0].attributes == train[840].attributes
    assert not np.array_equal(train[0].pixels, train[840].pixels)


def test_pixels_and_mask_have_the_sizes_that_were_asked_for():
    for size in (16, 33):
        record = next(records(size, 1, 1))
        assert record.pixels.shape == (size, size, 3) and record.pixels.dtype == np.uint8
        assert record.mask.shape == (size, size) and record.mask.dtype == bool


def test_the_mask_is_where_the_colour_is(drawn):
    """The object's colour inside, the background's outside, but for half-covered pixels of an edge."""
    for record in drawn:
        pixels = record.pixels.astype(float)
        colour = np.array(COLOURS[record.attributes["colour"]])
        ground = np.array(BACKGROUNDS[record.attributes["background"]])
        to_colour, to_ground = (np.abs(pixels - target).max(axis=-1) for target in (colour, ground))
        looks_like_object = to_colour < to_ground
        agree = (looks_like_object == record.mask).mean()
        assert agree > 0.93, (record.key, agree)
        assert np.median(to_colour[record.mask]) <= 13, record.key
        assert np.median(to_ground[~record.mask]) <= 20, record.key


def test_the_mask_shows_the_size_and_the_place(drawn):
    middle, width = {}, {}
    for record in drawn:
        columns = np.flatnonzero(record.mask.any(axis=0))
        middle.setdefault(record.attributes["place"], []).append(columns.mean() / 31)
        width.setdefault(record.attributes["size"], []).append(len(columns) / 32)
    assert max(middle["left"]) < min(middle["centre"]) and max(middle["centre"]) < min(middle["right"])
    assert max(width["small"]) < min(width["large"])
    assert set(middle) == set(PLACES) and set(width) == set(SIZES)


def test_objects_have_different_outlines(drawn):
    """Share of the mask's bounding box that is filled, and whether its middle is: enough to tell the four."""
    filled = {}
    for record in drawn:
        rows, columns = np.flatnonzero(record.mask.any(axis=1)), np.flatnonzero(record.mask.any(axis=0))
        box = record.mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        h, w = box.shape
        assert bool(box[h // 2, w // 2]) == (record.attributes["object"] != "ring")
        filled.setdefault(record.attributes["object"], []).append(box.mean())
    means = {kind: np.mean(values) for kind, values in filled.items()}
    assert means["square"] > 0.85 and 0.4 < means["triangle"] < 0.65 and 0.4 < means["cross"] < 0.75


def test_no_combination_of_the_test_split_is_ever_seen_in_training(drawn):
    seen = {split: {tuple(r.attributes.values()) for r in drawn if r.split == split} for split in ("train", "test")}
    assert not seen["train"] & seen["test"]
    assert len(seen["train"]) == 840 and len(seen["test"]) == 120
    captions = {split: {c for r in drawn if r.split == split for c in r.captions} for split in ("train", "test")}
    assert not captions["train"] & captions["test"]
    split = combinations(0)
    everything = {tuple(values) for values in itertools.product(*ATTRIBUTES.values())}
    assert {tuple(each.values()) for each in split["train"] + split["test"]} == everything


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_value_of_every_attribute_occurs_in_both_splits(seed):
    for name, part in combinations(seed).items():
        for attribute, values in ATTRIBUTES.items():
            assert {each[attribute] for each in part} == set(values), (name, attribute)


def test_captions_name_every_attribute_and_all_wordings_differ(drawn):
    for record in drawn[::17]:
        assert len(set(record.captions)) == len(synthetic.TEMPLATES) == 10
        for text in record.captions:
            words = text.replace(",", " ").split()
            for attribute in ("object", "colour", "size", "background", "place"):
                assert record.attributes[attribute] in words, (text, attribute)
            others = set(COLOURS) - {record.attributes["colour"]}
            assert not others & set(words), text


def test_a_caption_says_one_combination_and_no_other():
    every = [dict(zip(ATTRIBUTES, values, strict=True)) for values in itertools.product(*ATTRIBUTES.values())]
    for template in range(10):
        assert len({caption(each, template) for each in every}) == len(every)


def test_an_object_never_has_the_colour_of_its_background(drawn):
    for record in drawn:
        inside = record.pixels[record.mask].astype(float).mean(axis=0)
        outside = record.pixels[~record.mask].astype(float).mean(axis=0)
        assert np.abs(inside - outside).max() > 40, record.key


def test_small_objects_stay_inside_the_image(drawn):
    for record in drawn:
        if record.attributes["size"] == "small":
            rim = record.mask.copy()
            rim[1:-1, 1:-1] = False
            assert not rim.any(), record.key


def test_images_too_small_to_show_an_object_are_refused():
    with pytest.raises(SettingsError, match="data.resize=8.*16 px"):
        next(records(8))


def test_labels_are_the_kind_of_object(drawn):
    assert all(synthetic.OBJECTS[record.label] == record.attributes["object"] for record in drawn)


def test_the_object_is_found_by_its_distance_from_the_background(drawn):
    pixels = np.stack([record.pixels for record in drawn])
    masks = synthetic.object_mask(pixels, [record.attributes["background"] for record in drawn])
    exact = np.stack([record.mask for record in drawn])
    union = (masks | exact).sum(axis=(1, 2))
    overlap = (masks & exact).sum(axis=(1, 2)) / union
    assert masks.dtype == bool and overlap.mean() > 0.96 and overlap.min() > 0.8


def test_each_image_needs_the_name_of_its_background(drawn):
    with pytest.raises(ValueError, match="1 images and 2 backgrounds"):
        synthetic.object_mask(drawn[0].pixels[None], ["white", "black"])
    assert synthetic.object_mask(np.zeros((0, 16, 16, 3), np.uint8), []).shape == (0, 16, 16)
