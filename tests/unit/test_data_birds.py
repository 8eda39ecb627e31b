"""The reader of CUB-200-2011 on a made-up root in the official layout."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from ratlip.data import birds
from ratlip.data.prepared import prepare
from ratlip.errors import DataError

NAMES = ["001.Albatross/Albatross_1", "001.Albatross/Albatross_2", "002.Crow/Crow_1", "003.Wren/Wren_1"]


def write_names(root, split, names):
    (root / split).mkdir(exist_ok=True)
    (root / split / "filenames.pickle").write_bytes(pickle.dumps(names, protocol=2))


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "birds"
    cub = root / "CUB_200_2011"
    rng = np.random.default_rng(0)
    for name in NAMES:
        image, text = cub / "images" / f"{name}.jpg", root / "text" / f"{name}.txt"
        for path in (image, text):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(image)
        text.write_text(f"this is {name}.\n\n a Bird,  with\ta beak! \n")
    (cub / "images.txt").write_text("".join(f"{i} {name}.jpg\n" for i, name in enumerate(NAMES, 1)))
    (cub / "bounding_boxes.txt").write_text("".join(f"{i} 20.0 10.5 40.0 30.0\n" for i in range(1, 5)))
    (cub / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 3\n")
    (cub / "classes.txt").write_text("1 001.Albatross\n2 002.Crow\n3 003.Wren\n")
    (cub / "train_test_split.txt").write_text("1 0\n2 1\n3 1\n4 0\n")
    write_names(root, "train", NAMES[:3])
    write_names(root, "test", NAMES[3:])
    return root


def problems(root):
    with pytest.raises(DataError) as caught:
        birds.read(root)
    return str(caught.value)


def test_records(root):
    records = birds.read(root)
    assert [record.key for record in records] == NAMES
    assert [record.split for record in records] == ["train", "train", "train", "test"]
    assert [record.label for record in records] == [1, 1, 2, 3]
    assert records[0].captions == ("this is 001.Albatross/Albatross_1.", "a Bird, with a beak!")
    assert records[0].box == (20.0, 10.5, 40.0, 30.0)
    assert records[0].path == root / "CUB_200_2011" / "images" / f"{NAMES[0]}.jpg"
    assert records.about["labels"] == {"train": 2, "test": 1} and records.about["labels_in_both_splits"] == 0


def test_prepared_birds_are_cropped(root, tmp_path):
    result = prepare(birds.read(root), tmp_path / "out", resize=30, settings={}, source=root, progress=False)
    # centre (40, 25), r = 30: columns 10 to 70, rows 0 to 55 (clipped); the shorter side becomes 30
    assert result.train.image(0).shape == (30, int(30 * 60 / 55), 3)
    assert result.manifest["about"]["crop"].startswith("square of 1.5")


@pytest.mark.parametrize("place", ["birds", ".", "birds/CUB_200_2011", "birds/text"])
def test_root_may_be_one_level_off(root, tmp_path, place):
    assert len(birds.read(tmp_path / place)) == 4


def test_wrong_root_shows_the_layout(root, tmp_path):
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "absent", root / "CUB_200_2011" / "images"):
        with pytest.raises(DataError) as caught:
            birds.read(wrong)
        assert str(wrong) in str(caught.value) and "bounding_boxes" in str(caught.value)
    shutil.copytree(root, tmp_path / "birds2")
    with pytest.raises(DataError, match="several roots.*birds, birds2"):
        birds.read(tmp_path)


def test_all_problems_at_once(root):
    cub = root / "CUB_200_2011"
    image = cub / "images" / f"{NAMES[0]}.jpg"
    image.write_bytes(image.read_bytes()[:-300])
    (cub / "images" / f"{NAMES[1]}.jpg").unlink()
    (root / "text" / f"{NAMES[2]}.txt").unlink()
    (root / "text" / f"{NAMES[3]}.txt").write_text(" \n\n")
    (cub / "bounding_boxes.txt").write_text("1 20 10 40 30\n2 20 10 40 30\n3 20 10 forty 30\n4 500 9 40 30\n")
    write_names(root, "train", [*NAMES[:3], "004.Owl/Owl_1", NAMES[3]])
    message = problems(root)
    for expected in (
        f"{NAMES[0]}.jpg: the image cannot be decoded",
        f"{NAMES[1]}.jpg: the image file is missing",
        f"{NAMES[2]}.txt: the caption file is missing",
        f"{NAMES[3]}.txt: the caption file is empty",
        "bounding_boxes.txt:3: expected 'image_id x y width height', found '3 20 10 forty 30'",
        "bounding_boxes.txt: there is no box for image 3",
        f"{NAMES[3]}.jpg: box x=500",
        "train/filenames.pickle: 004.Owl/Owl_1 is no image of images.txt",
        f"{NAMES[3]} is in both splits",
    ):
        assert expected in message
    assert message.startswith("9 problems")


@pytest.mark.parametrize(
    "file, text, expected",
    [
        ("images.txt", f"1 {NAMES[0]}.jpg\n1 {NAMES[1]}.jpg\n", "images.txt:2: 1 occurs twice"),
        ("images.txt", "".join(f"{i} {NAMES[0]}.jpg\n" for i in (1, 2)), "occurs twice"),
        ("images.txt", "1\n", "images.txt:1: expected 'image_id image_name', found '1'"),
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n", "there is no class for image 4"),
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n4 2\n", "is said to be 002.Crow"),
        ("bounding_boxes.txt", "", "there is no box for image 1"),
    ],
)
def test_bad_lists(root, file, text, expected):
    (root / "CUB_200_2011" / file).write_text(text)
    assert expected in problems(root)


@pytest.mark.parametrize(
    "missing",
    [
        "CUB_200_2011/images.txt",
        "CUB_200_2011/bounding_boxes.txt",
        "CUB_200_2011/classes.txt",
        "test/filenames.pickle",
        "text",
    ],
)
def test_missing_parts_are_one_problem_each(root, missing):
    path = root / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = problems(root)
    assert f"{path}: the f" in message and "missing" in message and message.startswith("1 problem ")


def test_missing_split_says_where_to_get_it(root):
    for split in ("train", "test"):
        shutil.rmtree(root / split)
    assert "ratlip download birds" in problems(root)
    (root / "trainvalclasses.txt").write_text("001.Albatross\n002.Crow\n")
    (root / "testclasses.txt").write_text("003.Wren\n")
    assert [record.split for record in birds.read(root)] == ["train", "train", "train", "test"]


def test_split_that_is_no_list_of_names(root):
    (root / "train" / "filenames.pickle").write_bytes(pickle.dumps([1, 2]))
    assert "train/filenames.pickle: holds a int at position 0" in problems(root)


def test_images_in_no_split_are_left_out_and_counted(root):
    write_names(root, "train", NAMES[:2])
    records = birds.read(root)
    assert len(records) == 3 and records.about["images_in_no_split"] == 1


def test_broken_utf8_in_captions_becomes_blanks(root):
    text = root / "text" / f"{NAMES[0]}.txt"
    text.write_bytes("this\ufffd\ufffdbird\ufffd\ufffdis red\n".encode() + b"caf\xe9 brown\n")
    assert birds.read(root)[0].captions == ("this bird is red", "caf brown")
