"""The reader of Oxford-102 on a made-up root in the official layout."""

import pickle

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ratlip.data import flowers
from ratlip.errors import DataError

CLASSES = {1: 77, 2: 77, 3: 4, 4: 12}  # image: class; 4 and 12 are test classes of our own rule


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "flowers"
    (root / "jpg").mkdir(parents=True)
    for image, label in CLASSES.items():
        Image.fromarray(np.full((20, 24, 3), image, np.uint8)).save(root / "jpg" / f"image_{image:05d}.jpg")
        text = root / "text_c10" / f"class_{label:05d}" / f"image_{image:05d}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("".join(f"flower {image}, caption {i}\n" for i in range(1 + image)))
    return root


def write_manifest(root, kinds):
    rows = [f"image_{image:05d}.jpg\t{CLASSES[image]}\ta name\t{kind}\n" for image, kind in kinds.items()]
    (root / "manifest.tsv").write_text("name\tclass_id\tclass_name\tcaption_kind\n" + "".join(rows))


def problems(root, **options):
    with pytest.raises(DataError) as caught:
        flowers.read(root, **options)
    return str(caught.value)


def test_records(root):
    records = flowers.read(root)
    assert [record.key for record in records] == [f"image_{i:05d}" for i in range(1, 5)]
    assert [record.label for record in records] == [77, 77, 4, 12]
    assert [record.split for record in records] == ["train", "train", "test", "test"]
    assert records[1].captions == ("flower 2, caption 0", "flower 2, caption 1", "flower 2, caption 2")
    assert "own class-disjoint rule" in records.about["split"]
    assert records.about["labels_in_both_splits"] == 0


def test_own_rule_is_fixed_and_has_the_published_proportion():
    test = {int(folder[-5:]) for folder, split in flowers.own_split().items() if split == "test"}
    assert sorted(test) == [4, 12, 14, 20, 21, 24, 27, 38, 43, 47, 48, 61, 64, 67, 71, 78, 80, 90, 98, 102]
    assert len(test) == 20 and flowers.CLASSES - len(test) == 82


def test_published_class_lists_are_preferred_to_our_rule(root):
    (root / "trainvalclasses.txt").write_text("class_00004\nclass_00012\n")
    (root / "testclasses.txt").write_text("class_00077\n")
    records = flowers.read(root)
    assert [record.split for record in records] == ["test", "test", "train", "train"]
    (root / "testclasses.txt").write_text("class_00077\nclass_00004\n")
    assert "testclasses.txt: class_00004 is in both splits" in problems(root)
    (root / "testclasses.txt").unlink()
    assert "testclasses.txt: the file is missing" in problems(root)


def test_pickled_names_are_preferred_to_class_lists(root):
    for split, names in (("train", ["jpg/image_00001", "jpg/image_00003"]), ("test", ["image_00002"])):
        (root / split).mkdir()
        (root / split / "filenames.pickle").write_bytes(pickle.dumps(names))
    records = flowers.read(root)
    assert {record.key: record.split for record in records} == {
        "image_00001": "train",
        "image_00003": "train",
        "image_00002": "test",
    }
    assert records.about["images_in_no_split"] == 1
    (root / "test" / "filenames.pickle").write_bytes(pickle.dumps(["image_00099", "image_00002"]))
    assert "test/filenames.pickle: image_00099 has no image in jpg/" in problems(root)


def test_human_captions_only(root):
    write_manifest(root, {1: "human", 2: "template", 3: "human", 4: "template"})
    human = flowers.read(root, human_captions_only=True)
    assert [record.key for record in human] == ["image_00001", "image_00003"]
    records = flowers.read(root)
    assert len(records) == 4 and records.about["caption_kinds"] == {"human": 2, "template": 2}


def test_all_captions_are_human_without_a_manifest(root):
    assert len(flowers.read(root, human_captions_only=True)) == 4


@pytest.mark.parametrize(
    "text, expected",
    [
        ("image\tkind\n", "manifest.tsv:1: expected columns"),
        ("name\tcaption_kind\nimage_00001.jpg\n", "manifest.tsv:2: expected 2 columns, found 'image_00001.jpg'"),
    ],
)
def test_bad_manifest(root, text, expected):
    (root / "manifest.tsv").write_text(text)
    assert expected in problems(root)


def test_all_problems_at_once(root):
    image = root / "jpg" / "image_00001.jpg"
    image.write_bytes(image.read_bytes()[:-40])
    (root / "jpg" / "image_00002.jpg").unlink()
    (root / "text_c10" / "class_00004" / "image_00003.txt").write_text("\n")
    (root / "text_c10" / "class_00012" / "image_00004.txt").unlink()
    (root / "text_c10" / "class_00077" / "image_00003.txt").write_text("again\n")
    (root / "text_c10" / "class_rose").mkdir()
    (root / "text_c10" / "class_rose" / "image_00007.txt").write_text("a rose\n")
    message = problems(root)
    for expected in (
        "image_00001.jpg: the image cannot be decoded",
        "image_00002.jpg: the image of text_c10/class_00077/image_00002.txt is missing",
        "class_00004/image_00003.txt: the caption file is empty",
        "image_00004.txt: the caption file is missing",
        "image_00003 has captions in class_00004 too",
        "class_rose: expected a folder name like class_00001",
    ):
        assert expected in message
    assert message.startswith("6 problems")


def test_official_labels_are_compared(root):
    labels = np.array([[77, 77, 4, 12]], np.uint8)
    savemat(root / "imagelabels.mat", {"labels": labels})
    assert len(flowers.read(root)) == 4
    labels[0, 2] = 5
    savemat(root / "imagelabels.mat", {"labels": labels})
    assert "image_00003.txt: lies in class 4, imagelabels.mat says 5" in problems(root)
    (root / "imagelabels.mat").write_bytes(b"nothing")
    assert "imagelabels.mat: cannot be read" in problems(root)


@pytest.mark.parametrize("place", ["flowers", ".", "flowers/jpg", "flowers/text_c10"])
def test_root_may_be_one_level_off(root, tmp_path, place):
    assert len(flowers.read(tmp_path / place)) == 4


def test_wrong_root_shows_the_layout(tmp_path):
    assert "text_c10/class_00077" in problems(tmp_path)


def test_missing_captions_are_one_problem(root):
    (root / "text_c10").rename(root / "text")
    message = problems(root)
    assert message.startswith("1 problem ") and "ratlip download flowers" in message
