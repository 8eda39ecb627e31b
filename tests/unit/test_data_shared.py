"""The readers on the real, partial data beside the repository (skipped where it is absent)."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from ratlip.data import birds, faces, flowers
from ratlip.data.prepared import prepare
from ratlip.data.records import Records, published_crop

pytestmark = pytest.mark.shared


def some(records, number):
    """Every so many of the records, from both splits."""
    return Records(records[:: max(1, len(records) // number)], records.about)


def test_birds(shared, unpacked, tmp_path):
    root = unpacked(shared, "birds")
    records = birds.read(root)
    assert Counter(record.split for record in records) == {"train": 1906, "test": 983}
    assert records.about["labels"] == {"train": 33, "test": 17}
    assert records.about["labels_in_both_splits"] == 0
    assert {len(record.captions) for record in records} == {10}
    assert not any("\ufffd" in caption for record in records for caption in record.captions)
    result = prepare(records, tmp_path / "out", resize=32, settings={}, source=root, progress=False)
    assert result.manifest["counts"] == {"train": 1906, "test": 983}  # all decode, and all boxes fit
    record = [record for record in records if record.split == "test"][-1]
    image = Image.open(record.path).convert("RGB")
    image = image.crop(published_crop(record.box, *image.size))
    np.testing.assert_array_equal(result.test.image(-1), np.asarray(transforms.Resize(32)(image)))


def test_flowers(shared, unpacked, tmp_path):
    root = unpacked(shared, "flowers")
    records = flowers.read(root)
    assert len(records) == 3619 and records.about["caption_kinds"] == {"human": 819, "template": 2800}
    assert records.about["labels"] == {"train": 82, "test": 20}
    human = flowers.read(root, human_captions_only=True)
    assert len(human) == 819 and not any("a type of flower" in record.captions[0] for record in human)
    result = prepare(some(human, 40), tmp_path / "out", resize=64, settings={}, source=root, progress=False)
    assert all(min(result.train.image(i).shape[:2]) == 64 for i in range(len(result.train)))


def test_faces(shared, unpacked, tmp_path):
    root = unpacked(shared, "faces")
    records = faces.read(root)
    assert records.about["expected_images"] == 6000
    assert records.about["found_images"] == len(records) == 3820
    assert records.about["labels_in_both_splits"] == 0
    assert max(Counter(record.label for record in records).values()) == 2
    assert len(faces.read(root, tiny=False)) == 3896
    result = prepare(some(records, 40), tmp_path / "out", resize=64, settings={}, source=root, progress=False)
    assert result.train.image(0).shape == (int(64 * 218 / 178), 64, 3)
