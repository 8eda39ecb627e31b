"""The reader of a folder of one's own: both layouts, both splits, every problem at once."""

import json

import numpy as np
import pytest
from PIL import Image

from ratlip.data import birds, faces, flowers, folder
from ratlip.data.prepared import prepare
from ratlip.errors import DataError
from ratlip.settings import load_settings
from ratlip.workspace import Workspace

NAMES = [f"{number:02d}.png" for number in range(24)]
OF_TEST = ["14.png", "23.png"]  # as sha256sum says


def picture(path, number=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 24, 3), number, np.uint8)).save(path, **options)


def texts(root, names=NAMES, first=0):
    for number, name in enumerate(names, start=first):
        picture(root / name, number)
        (root / name).with_suffix(".txt").write_text(f"picture  {number}\n\nanother caption {number} \n")
    return root


def table(root, rows):
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def metadata(root, names=NAMES, first=0):
    for number, name in enumerate(names, start=first):
        picture(root / name, number)
    said = ["picture  {}", ["picture {}", " another caption {}"]]
    rows = [(name, said[n % 2], n) for n, name in enumerate(names, start=first)]
    fill = lambda text, n: text.format(n) if isinstance(text, str) else [each.format(n) for each in text]  # noqa: E731
    table(root, [{"file_name": name, "text": fill(text, n), "other": 1} for name, text, n in rows])
    return root


def problems(root):
    with pytest.raises(DataError) as caught:
        folder.read(root)
    return str(caught.value)


def test_texts_beside_pictures_and_a_split_by_name(tmp_path):
    (texts(tmp_path) / "README.txt").write_text("about")
    (tmp_path / ".hidden.png").write_bytes(b"no picture")
    records = folder.read(tmp_path)
    assert [record.key for record in records] == NAMES
    assert records[3].captions == ("picture 3", "another caption 3") and records[3].label == -1
    assert [record.key for record in records if record.split == "test"] == OF_TEST
    assert records.about["layout"] == [".txt"] and "file name" in records.about["split"]


def test_a_picture_more_moves_no_other(tmp_path):
    before = {record.key: record.split for record in folder.read(texts(tmp_path))}
    after = {record.key: record.split for record in folder.read(texts(tmp_path, ["00a.png"], 99))}
    assert after.items() > before.items()


def test_metadata_with_a_caption_or_a_list(tmp_path):
    records = folder.read(metadata(tmp_path))
    assert [record.captions for record in records[:2]] == [("picture 0",), ("picture 1", "another caption 1")]
    assert records.about["layout"] == ["metadata.jsonl"]


def test_folders_of_both_splits_each_in_its_layout(tmp_path):
    texts(tmp_path / "train", ["a/1.jpg", "b/1.jpg"])
    metadata(tmp_path / "test", ["1.jpg"], 7)
    texts(tmp_path / "validation", ["1.jpg"], 9)
    records = folder.read(tmp_path)
    assert {record.key: record.split for record in records} == {
        "test/1.jpg": "test",
        "train/a/1.jpg": "train",
        "train/b/1.jpg": "train",
        "validation/1.jpg": "validation",
    }
    assert records.about["layout"] == ["metadata.jsonl", ".txt"]


def test_one_table_above_both_splits_as_huggingface_allows(tmp_path):
    metadata(tmp_path, ["train/1.png", "test/1.png"])
    assert [record.split for record in folder.read(tmp_path)] == ["test", "train"]


def test_a_table_within_another_ones_folder(tmp_path):
    metadata(tmp_path, ["train/1.png"])
    metadata(tmp_path / "test", ["2.png"], 5)
    assert len(folder.read(tmp_path)) == 2


def test_pictures_are_turned_as_their_exif_says(tmp_path):
    texts(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / "00.png", exif=exif)
    prepared = prepare(folder.read(tmp_path), tmp_path.parent / "out", resize=20, settings={}, source="x")
    assert prepared.train.keys[0] == "00.png" and prepared.train.image(0).shape == (30, 20, 3)


def test_all_problems_of_texts_at_once(tmp_path):
    texts(tmp_path)
    (tmp_path / "00.txt").unlink()
    (tmp_path / "01.txt").write_text(" \n")
    (tmp_path / "03.png").unlink()
    (tmp_path / "05.png").write_bytes((tmp_path / "05.png").read_bytes()[:40])
    picture(tmp_path / "06.jpg")
    (tmp_path / "07.heic").write_bytes(b"")
    (tmp_path / "08.png").write_bytes((tmp_path / "14.png").read_bytes())  # 14 is test
    said = problems(tmp_path)
    assert f"7 problems in your pictures in {tmp_path}" in said
    assert f"{tmp_path}/00.txt: the caption file is missing" in said
    assert f"{tmp_path}/01.txt: the caption file is empty" in said
    assert f"{tmp_path}/03.txt: the picture of this name is missing" in said
    assert f"{tmp_path}/05.png: the image cannot be decoded" in said
    assert f"{tmp_path}/06.txt: stands beside two pictures, 06.jpg and 06.png" in said
    assert f"{tmp_path}/07.heic: pictures of this kind are not read" in said
    assert f"{tmp_path}/14.png: is the same picture as {tmp_path}/08.png, which is in train" in said


def test_all_problems_of_metadata_at_once(tmp_path):
    metadata(tmp_path)
    rows = (tmp_path / "metadata.jsonl").read_text().splitlines()[3:]
    rows += ['{"file_name": "missing.png", "text": "x"}', '{"file_name": "../out.png", "text": "x"}']
    rows += ['{"file_name": "00.png", "text": ["x", " "]}', '{"file_name": "01.png", "caption": "x"}', '{"file_name"']
    rows += ['{"file_name": "10.png", "text": "again"}', '{"file_name": "/02.png", "text": "x"}', "[1]"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    said, at = problems(tmp_path), f"{tmp_path}/metadata.jsonl"
    assert "10 problems" in said
    assert f"{tmp_path}/missing.png: the picture is missing ({at}:22 names it)" in said
    assert f"{at}:23: file_name '../out.png' leads out of {tmp_path}" in said
    assert f"{at}:24: the caption of 00.png is empty" in said
    assert f"{at}:25: expected file_name (a name) and text (a caption, or a list of them), found file_name, cap" in said
    assert f"{at}:26: is no JSON" in said and f"{at}:27: 10.png is named twice" in said
    assert f"{at}:28: file_name '/02.png' leads out" in said and f"{at}:29: expected file_name" in said
    assert all(f"{tmp_path}/{name}.png: is not named in {at}" in said for name in ("01", "02"))


def test_half_a_split_and_pictures_beside_it(tmp_path):
    texts(tmp_path / "train", ["1.jpg"])
    texts(tmp_path, ["2.jpg"], 3)
    said = problems(tmp_path)
    assert f"{tmp_path}/test: the folder is missing, though train/ is there" in said
    assert f"{tmp_path}/2.jpg: lies in no split" in said


def test_the_same_picture_may_come_twice_within_a_split_only(tmp_path):
    texts(tmp_path / "train", ["1.png", "2.png"])
    texts(tmp_path / "test", ["1.png"], 7)
    (tmp_path / "train/2.png").write_bytes((tmp_path / "train/1.png").read_bytes())
    assert len(folder.read(tmp_path)) == 3
    (tmp_path / "train/2.png").write_bytes((tmp_path / "test/1.png").read_bytes())
    assert "same picture" in problems(tmp_path)


@pytest.mark.parametrize("names, said", [([], "there is no image in it"), (["00.png"], "no picture for test")])
def test_too_few_pictures(tmp_path, names, said):
    assert said in problems(texts(tmp_path, names))


def test_a_folder_that_is_not_there_shows_how_one_looks(tmp_path):
    assert "metadata.jsonl" in problems(tmp_path / "none")


@pytest.mark.parametrize("reader", [birds, flowers, faces, folder])
@pytest.mark.parametrize("kind", ["file", "folder", "nowhere", "inside"])
def test_links_that_lead_out_are_refused_by_every_reader(tmp_path, reader, kind):
    root, outside = tmp_path / "root", tmp_path / "outside"
    texts(outside)
    first = reader.SOURCE.parts[0] if reader is not folder else "train"
    (root / first).mkdir(parents=True)
    targets = {"file": outside / "00.png", "folder": outside, "nowhere": tmp_path / "gone", "inside": root / first}
    (root / first / "link").symlink_to(targets[kind])
    alias = tmp_path / "alias"
    alias.symlink_to(root)  # the root itself may be a link
    with pytest.raises(DataError) as caught:
        reader.read(alias)
    refused = f"{alias / first / 'link'}: is a link that leads out of {alias} (to {targets[kind]})" in str(caught.value)
    assert refused == (kind != "inside")


def test_prepare_by_a_profile_given_as_a_path_writes_nothing_where_something_is_wrong(ratlip, tmp_path):
    root, profile = texts(tmp_path / "own"), tmp_path / "my.yaml"
    profile.write_text("extends: smoke\ndata: {dataset: folder}\n")
    out = tmp_path / "out"
    (root / "00.txt").write_text("")
    status, _, err = ratlip("prepare", "-p", profile, "--data", root, "--out", out, "-q")
    assert status == 2 and f"{root}/00.txt: the caption file is empty" in err and not out.exists()
    (root / "00.txt").write_text("one\n")
    status, said, err = ratlip("prepare", "-p", profile, "--data", root, "--out", out, "-q")
    assert status == 0 and "22 training and 2 test images" in said, err
    assert Workspace.of(load_settings(profile), out).prepared.train.captions[0] == ["one"]


def test_a_profile_of_ones_own_without_data_says_what_to_give(ratlip, tmp_path):
    (tmp_path / "my.yaml").write_text("extends: smoke\ndata: {dataset: folder}\n")
    status, _, err = ratlip("prepare", "-p", tmp_path / "my.yaml", "--out", tmp_path / "out")
    assert status == 2 and "PROFILE=my.yaml" in err and "ratlip profile new" in err
    status, _, err = ratlip("download", "folder", "--to", tmp_path)
    assert status == 2 and "choose one of birds, flowers, faces" in err
