"""The readers on the complete official layouts, rebuilt from the shared parts: as many rows, and all that lies beside.

The pictures are hard links to the shared ones, again and again; what no reader may trip over is there too (parts,
attributes, features of other people's methods).
"""

import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from ratlip.data import birds, download, faces, flowers
from ratlip.errors import DataError

pytestmark = [pytest.mark.slow, pytest.mark.shared]
COLOURS = "red blue white pink yellow orange purple green brown black".split()


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)


def write(root: Path, **files) -> None:
    for name, rows in files.items():
        (root / f"{name}.txt").write_text("".join(f"{row}\n" for row in rows))


def test_all_birds(unpacked, shared, tmp_path):
    """200 classes, 11,788 rows; the split as it comes, with what AttnGAN and Caltech pack beside."""
    given, root = unpacked(shared, "birds"), tmp_path / "birds"
    old, cub = given / "CUB_200_2011", root / "CUB_200_2011"
    rows = [line.split() for line in (old / "images.txt").read_text().splitlines()]
    boxes = dict(line.split(maxsplit=1) for line in (old / "bounding_boxes.txt").read_text().splitlines())
    kinds = sorted({name.split("/")[0] for _, name in rows})
    names, tables, split = [], {"images": [], "bounding_boxes": [], "image_class_labels": []}, {"train": [], "test": []}
    for number in range(1, 11_789):
        kind, row = (number - 1) * 200 // 11_788, rows[(number - 1) % len(rows)]
        folder = f"{kind + 1:03d}.{kinds[kind % len(kinds)].split('.')[1]}_{kind // len(kinds)}"
        key = f"{folder}/{Path(row[1]).stem}_{number}"
        link(old / "images" / row[1], cub / "images" / f"{key}.jpg")
        link(given / "text" / Path(row[1]).with_suffix(".txt"), root / "text" / f"{key}.txt")
        names.append(folder)
        tables["images"].append(f"{number} {key}.jpg")
        tables["bounding_boxes"].append(f"{number} {boxes[row[0]]}")
        tables["image_class_labels"].append(f"{number} {kind + 1}")
        split["train" if kind < 150 else "test"].append(key)
    write(cub, **tables, classes=[f"{i} {name}" for i, name in enumerate(dict.fromkeys(names), 1)], train_test_split=[])
    write(root, attributes=["1 has_bill_shape::curved"], example_filenames=["a"])
    for part in ("parts", "attributes"):
        (cub / part).mkdir()
        write(cub / part, parts=["1 back"])
    for name, keys in split.items():
        (root / name).mkdir()
        (root / name / "filenames.pickle").write_bytes(pickle.dumps(keys, protocol=0))
        (root / name / "char-CNN-RNN-embeddings.pickle").write_bytes(b"not to be read")
    (root / "captions.pickle").write_bytes(b"not to be read")
    records = birds.read(root)
    assert len(records) == birds.COMPLETE["images"] and records.about["labels"] == {"train": 150, "test": 50}
    assert {len(record.captions) for record in records} == {10}
    assert not download.missing("birds", root)


def test_all_flowers(unpacked, shared, tmp_path):
    """8,189 images of ten captions, Reed's class lists and features, Oxford's labels."""
    given, root = unpacked(shared, "flowers"), tmp_path / "flowers"
    known = {int(path.stem[6:]): int(path.parent.name[6:]) for path in given.glob("text_c10/*/*.txt")}
    pictures = sorted((given / "jpg").glob("*.jpg"))
    labels = [known.get(number, 1 + number % 102) for number in range(1, 8190)]
    for number, label in enumerate(labels, start=1):
        link(pictures[number % len(pictures)], root / "jpg" / f"image_{number:05d}.jpg")
        folder = root / "text_c10" / f"class_{label:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, **{f"image_{number:05d}": [f"a flower with {colour} petals" for colour in COLOURS]})
        (folder.parent / f"{folder.name}.t7").write_bytes(b"not to be read")
    names = [f"class_{number:05d}" for number in range(1, 103)]
    write(root, allclasses=names, trainvalclasses=names[20:], testclasses=names[:20], valclasses=names[20:40])
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    records = flowers.read(root)
    assert len(records) == flowers.COMPLETE["images"] and records.about["labels"] == {"train": 82, "test": 20}
    assert "published class-disjoint split" in records.about["split"]
    assert {len(record.captions) for record in records} == {10} and not download.missing("flowers", root)


@pytest.mark.parametrize("own", [False, True])
def test_faces_in_the_folders_they_come_in(unpacked, shared, tmp_path, own):
    """10,000 rows (all 202,599 take a minute) with the official partition; in one folder, or in Img, Anno and Eval."""
    given, root, count = unpacked(shared, "faces"), tmp_path / "CelebA", 10_000
    pictures = sorted((given / "img_align_celeba").glob("*.jpg"))
    _, header, *rows = (given / "list_attr_celeba.txt").read_text().splitlines()
    images, lists, evaluation = (root / name if own else root for name in ("Img", "Anno", "Eval"))
    names = [f"{number:06d}.jpg" for number in range(1, count + 1)]
    for number, name in enumerate(names):
        link(pictures[number % len(pictures)], images / "img_align_celeba" / name)
    for folder in (lists, evaluation):
        folder.mkdir(exist_ok=True)
    values = [rows[number % len(rows)].split(maxsplit=1)[1] for number in range(count)]
    attributes = [count, f"{header} ", *(f"{name} {row}" for name, row in zip(names, values, strict=True))]
    people = [f"{name} {number % 4000}" for number, name in enumerate(names)]
    write(lists, list_attr_celeba=attributes, identity_CelebA=people, list_bbox_celeba=["not to be read"])
    write(evaluation, list_eval_partition=[f"{name} {number * 3 // count}" for number, name in enumerate(names)])
    assert len(faces.read(root)) == faces.TINY_SIZE
    records = faces.read(root, tiny=False)
    assert Counter(record.split for record in records) == {"train": 6667, "test": 3333}
    assert "official" in records.about["split"] and not download.missing("faces", root)
    (lists / "link.txt").symlink_to(given / "list_attr_celeba.txt")
    with pytest.raises(DataError, match="leads out"):
        faces.read(root)
