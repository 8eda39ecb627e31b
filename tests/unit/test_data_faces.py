"""The reader of CelebA on a made-up root, CelebA-tiny's rule, and the captions made from attributes."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ratlip.data import faces
from ratlip.errors import DataError

NAMES = sorted(faces.ATTRIBUTES)
# Written down, so that a change of the rule or the grammar, which changes the dataset, is a decision.
TEST_IDENTITIES = [6, 9, 11, 14, 15, 18, 20]
CAPTIONS_OF_ONE_IMAGE = (
    "a young woman with wavy blond hair, smiling",
    "a photo of a smiling woman who has wavy blond hair and bangs and wears earrings",
    "this young woman has wavy blond hair and is smiling",
    "a photo of a smiling young woman who has wavy blond hair and wears earrings",
)


def write_attributes(root, rows):
    lines = [str(len(rows)), " ".join(NAMES)]
    lines += [
        f"{name} " + "  ".join("1" if attribute in has else "-1" for attribute in NAMES) for name, has in rows.items()
    ]
    (root / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path):
    """Twelve images of six people: 1 1 1 2 2 3 4 5 6 6 6 6, listed in reverse order."""
    root = tmp_path / "faces"
    (root / "img_align_celeba").mkdir(parents=True)
    people = dict(zip((f"{i:06d}.jpg" for i in range(1, 13)), (1, 1, 1, 2, 2, 3, 4, 5, 6, 6, 6, 6), strict=True))
    for name in people:
        Image.fromarray(np.zeros((22, 18, 3), np.uint8)).save(root / "img_align_celeba" / name)
    write_attributes(root, {name: {"Male", "Young", "Smiling"} for name in reversed(people)})
    (root / "identity_CelebA.txt").write_text("".join(f"{name} {who}\n" for name, who in people.items()))
    return root


def problems(root, **options):
    with pytest.raises(DataError) as caught:
        faces.read(root, **options)
    return str(caught.value)


def test_all_faces(root):
    records = faces.read(root, tiny=False)
    assert [record.key for record in records] == [f"{i:06d}" for i in range(1, 13)]
    assert [record.label for record in records] == [1, 1, 1, 2, 2, 3, 4, 5, 6, 6, 6, 6]
    assert records.about["labels_in_both_splits"] == 0
    assert {record.split for record in records} == {"train", "test"}


def test_tiny_takes_two_images_of_each_identity_by_file_name(root):
    records = faces.read(root)
    assert [int(record.key) for record in records] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert records.about["expected_images"] == 6000 and records.about["found_images"] == 9
    assert [int(record.key) for record in faces.read(root, size=4)] == [1, 2, 4, 5]


def test_split_is_by_identity_and_about_a_fifth_is_test():
    splits = [faces.split_of_identity(identity) for identity in range(1, 10178)]
    assert Counter(splits)["test"] / len(splits) == pytest.approx(0.2, abs=0.01)
    assert [identity for identity, split in enumerate(splits[:20], 1) if split == "test"] == TEST_IDENTITIES


def test_official_partition_is_used_for_the_whole_set(root):
    (root / "list_eval_partition.txt").write_text("".join(f"{i:06d}.jpg {i % 3}\n" for i in range(1, 13)))
    records = faces.read(root, tiny=False)
    assert [record.split for record in records[:3]] == ["train", "test", "train"]
    assert "official" in records.about["split"]
    assert "identity-disjoint" in faces.read(root).about["split"]
    (root / "list_eval_partition.txt").write_text("000001.jpg 7\n")
    assert "there is no partition (0, 1 or 2) for 000001.jpg" in problems(root, tiny=False)


def test_all_problems_at_once(root):
    image = root / "img_align_celeba" / "000001.jpg"
    image.write_bytes(image.read_bytes()[:-30])
    (root / "img_align_celeba" / "000002.jpg").unlink()
    attributes = root / "list_attr_celeba.txt"
    lines = attributes.read_text().split("\n")
    lines[3] = lines[3][:-2]  # 000011.jpg
    lines[4] = lines[4].replace("-1", "0")  # 000010.jpg
    lines[5] = lines[6]  # 000008.jpg twice
    attributes.write_text("\n".join(lines))
    identity = root / "identity_CelebA.txt"
    identity.write_text(identity.read_text().replace("000003.jpg 1", "000003.jpg one"))
    message = problems(root)
    for expected in (
        "000001.jpg: the image cannot be decoded",
        "000002.jpg: the image is missing",
        "list_attr_celeba.txt:4: expected a file name and 40 values 1 or -1, found '000011.jpg",
        "list_attr_celeba.txt:5: expected a file name and 40 values 1 or -1, found '000010.jpg",
        "list_attr_celeba.txt:7: 000008.jpg occurs twice",
        "identity_CelebA.txt:3: expected 'image identity', found '000003.jpg one'",
        "identity_CelebA.txt: there is no identity for 000003.jpg",
    ):
        assert expected in message
    assert message.startswith("7 problems")


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda text: text.replace("12\n", "13\n", 1), "list_attr_celeba.txt:1: says that there are '13' images"),
        (lambda text: text.replace("Bangs", "Fringe"), "list_attr_celeba.txt:2: expected the names of the 40"),
        (lambda text: "", "list_attr_celeba.txt:2"),
    ],
)
def test_bad_attribute_list(root, change, expected):
    attributes = root / "list_attr_celeba.txt"
    attributes.write_text(change(attributes.read_text()))
    assert expected in problems(root)


@pytest.mark.parametrize("name", ["list_attr_celeba.txt", "identity_CelebA.txt"])
def test_missing_lists(root, name):
    (root / name).unlink()
    assert f"{name}: the file is missing" in problems(root)


@pytest.mark.parametrize("place", ["faces", ".", "faces/img_align_celeba"])
def test_root_may_be_one_level_off(root, tmp_path, place):
    assert len(faces.read(tmp_path / place)) == 9


# --------------------------------------------------------------------------------------------------- captions


def random_attributes(seed):
    rng = np.random.default_rng(seed)
    return {name for name in NAMES if rng.random() < 0.3}


def test_captions_depend_on_the_file_name_alone(root):
    has = {"Young", "Wavy_Hair", "Blond_Hair", "Bangs", "Smiling", "Wearing_Earrings", "Oval_Face"}
    assert faces.caption_image("1.jpg", has) == faces.caption_image("1.jpg", sorted(has))
    assert faces.caption_image("1.jpg", has) != faces.caption_image("2.jpg", has)
    whole = {record.key: record.captions for record in faces.read(root, tiny=False)}
    part = {record.key: record.captions for record in faces.read(root, size=5)}
    assert all(whole[key] == captions for key, captions in part.items())


def test_captions_of_one_image_are_fixed():
    has = {"Young", "Wavy_Hair", "Blond_Hair", "Bangs", "Smiling", "Wearing_Earrings", "No_Beard"}
    assert faces.caption_image("000001.jpg", has, 4) == CAPTIONS_OF_ONE_IMAGE


def test_captions_are_different_and_their_number_is_bounded():
    for seed in range(200):
        captions = faces.caption_image(f"{seed}.jpg", random_attributes(seed), 10)
        assert 1 <= len(captions) <= 10 and len(set(captions)) == len(captions)
    assert faces.caption_image("a.jpg", set())  # nothing known: still a sentence


def test_captions_say_nothing_untrue():
    words = {
        "smiling": {"Smiling"},
        "young": {"Young"},
        "bangs": {"Bangs"},
        "eyeglasses": {"Eyeglasses"},
        "goatee": {"Goatee"},
        "wavy": {"Wavy_Hair"},
        "black": {"Black_Hair"},
        "bald": {"Bald"},
        "lipstick": {"Wearing_Lipstick"},
        "open": {"Mouth_Slightly_Open"},
        "man": {"Male"},
        "his": {"Male"},
        "pointy": {"Pointy_Nose"},
        "bushy": {"Bushy_Eyebrows"},
    }
    contrary = {"older": {"Young"}, "woman": {"Male"}, "her": {"Male"}, "beard": {"No_Beard"}}
    for seed in range(300):
        has = random_attributes(seed)
        for caption in faces.caption_image(f"{seed}.jpg", has):
            said = set(re.findall(r"[a-z'-]+", caption))
            assert all(words[word] <= has for word in said & words.keys()), (caption, has)
            assert not any(contrary[word] & has for word in said & contrary.keys()), (caption, has)
            assert not {"wavy", "straight"} <= said and not {"bald", "bangs"} <= said


def test_captions_are_clean_english():
    for seed in range(300):
        for caption in faces.caption_image(f"{seed}.jpg", random_attributes(seed)):
            assert caption == " ".join(caption.split()) and not caption.endswith((",", " and"))
            assert re.fullmatch(r"[a-z0-9,' -]+", caption)
            assert not re.search(r"\ba (?=[aeiou])|\ban (?=[^aeiou])|,,|and and|and,| ,", caption), caption
            assert len(re.findall(r"\bsmiling\b", caption)) <= 1
            assert caption.startswith(("a ", "an ", "this "))


def test_every_attribute_but_the_two_left_out_can_be_said():
    plain = {"No_Beard"}
    for attribute in faces.ATTRIBUTES - {"Attractive", "Blurry", "No_Beard"}:
        with_it, without = (faces.caption_image("1.jpg", has, 40) for has in (plain | {attribute}, plain))
        assert with_it != without, attribute
    for attribute in ("Attractive", "Blurry"):
        assert faces.caption_image("1.jpg", plain | {attribute}) == faces.caption_image("1.jpg", plain)
