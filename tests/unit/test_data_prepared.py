"""The prepared format: what goes in comes out, whole or not at all, and mistakes are all named."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from ratlip.data import prepared as prepared_module
from ratlip.data.prepared import check_files, existing, load_prepared, prepare, settings_hash
from ratlip.data.records import Record, Records
from ratlip.errors import DataError

SETTINGS = {"dataset": "made-up", "option": [1, 2]}


def make_records(folder, number=12):
    """Images of different shapes; every third is in memory with attributes and mask, the others are files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, records = np.random.default_rng(0), []
    for i in range(number):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        captions = tuple(f"picture {i}, caption {j}" for j in range(1 + i % 3))
        split = "test" if i % 4 == 3 else "train"
        common = dict(key=f"image_{i}", split=split, captions=captions, label=i % 5)
        if i % 3 == 0:
            drawn = dict(pixels=pixels, mask=pixels[..., 0] > 200, attributes={"colour": f"c{i}"})
            records.append(Record(**common, **drawn))
        else:
            Image.fromarray(pixels).save(folder / f"{i}.png")
            records.append(Record(**common, path=folder / f"{i}.png"))
    return Records(records, {"split": "every fourth"})


@pytest.fixture
def records(tmp_path):
    return make_records(tmp_path / "source")


def run(records, out, resize=20, settings=SETTINGS, **options):
    options = {"source": "/somewhere/root", "progress": False, **options}
    return prepare(records, out, resize=resize, settings=settings, **options)


def test_what_goes_in_comes_out(records, tmp_path):
    result = run(records, tmp_path / "out")
    for split in ("train", "test"):
        given = [record for record in records if record.split == split]
        part = result[split]
        assert part is getattr(result, split) and len(part) == len(given)
        assert part.keys == [record.key for record in given]
        assert part.labels.dtype == np.int64 and part.labels.tolist() == [record.label for record in given]
        assert part.captions == [list(record.captions) for record in given]
        assert part.caption_offsets.dtype == np.int64
        for i, record in enumerate(given):
            start, stop = part.caption_offsets[i : i + 2]
            assert part.all_captions[start:stop] == list(record.captions)
            assert part.attributes[i] == (record.attributes or {})


def test_images_are_resized_as_torchvision_does(records, tmp_path):
    result = run(records, tmp_path / "out", resize=16)
    resize = transforms.Resize(16)
    for i, record in enumerate(record for record in records if record.split == "train"):
        image = Image.fromarray(record.pixels) if record.path is None else Image.open(record.path)
        np.testing.assert_array_equal(result.train.image(i), np.asarray(resize(image)))


def test_images_of_the_right_size_are_kept_to_the_bit(tmp_path):
    records = make_records(tmp_path / "source")
    records = [replace(records[0], split=split, key=split) for split in ("train", "test")]
    result = run(records, tmp_path / "out", resize=20)
    np.testing.assert_array_equal(result.train.image(0), records[0].pixels)
    np.testing.assert_array_equal(result.test.mask(0), records[0].mask)


def test_images_are_read_only_views_of_the_file(records, tmp_path):
    part = run(records, tmp_path / "out").train
    image = part.image(0)
    assert image.dtype == np.uint8 and not image.flags.writeable and not image.flags.owndata
    assert np.shares_memory(part.image(0), image)
    np.testing.assert_array_equal(part.image(-1), part.image(len(part) - 1))
    with pytest.raises(IndexError):
        part.image(len(part))


def test_masks_follow_their_images(records, tmp_path):
    part = run(records, tmp_path / "out", resize=10).train
    masks = [part.mask(i) for i in range(len(part))]
    given = [record for record in records if record.split == "train"]
    for i, (mask, record) in enumerate(zip(masks, given, strict=True)):
        assert (mask is None) == (record.mask is None)
        if mask is not None:
            assert mask.dtype == bool and mask.shape == part.image(i).shape[:2]
            assert mask.mean() == pytest.approx(record.mask.mean(), abs=0.1)


def test_attributes_are_none_where_no_record_has_any(records, tmp_path):
    plain = [replace(record, attributes=None) for record in records]
    assert run(plain, tmp_path / "out").train.attributes is None


def test_manifest(records, tmp_path):
    result = run(records, tmp_path / "out", resize=16)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == result.manifest
    assert manifest["name"] == "made-up" and manifest["source"] == "root" and manifest["resize"] == 16
    assert manifest["counts"] == {"train": 9, "test": 3}
    assert manifest["captions"] == {split: len(result[split].all_captions) for split in ("train", "test")}
    assert manifest["settings"] == SETTINGS and manifest["hash"] == settings_hash(SETTINGS, 16)
    assert manifest["about"] == {"split": "every fourth"}
    assert manifest["image_sizes"]["train"] == {"smallest": [16, 16], "largest": [16, 24]}
    assert {"pillow", "datasets"} <= manifest["versions"].keys()
    assert "/somewhere" not in json.dumps(manifest)


def test_any_number_of_workers_writes_the_same(records, tmp_path):
    one, four = (run(records, tmp_path / str(n), workers=n) for n in (1, 4))
    assert one.manifest["content_sha256"] == four.manifest["content_sha256"]
    for i in range(len(one.train)):
        np.testing.assert_array_equal(one.train.image(i), four.train.image(i))


def test_checksum_covers_pixels_and_captions(records, tmp_path):
    def checksum(number, **changes):
        changed = [replace(records[0], **changes), *records[1:]]
        return run(changed, tmp_path / f"out{number}").manifest["content_sha256"]

    other = records[0].pixels.copy()
    other[3, 3, 0] ^= 1
    changes = [{}, {"pixels": other}, {"captions": ("other",)}, {"label": 9}, {"split": "test"}]
    assert len({checksum(number, **change) for number, change in enumerate(changes)}) == 5


def test_many_batches_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared_module, "BATCH_BYTES", 5000)
    records = make_records(tmp_path / "source", number=40)
    result = run(iter(records), tmp_path / "out", resize=20)  # a generator
    assert result.manifest["counts"] == {"train": 30, "test": 10}
    assert result.train.keys[-1] == "image_38"


def test_splits_can_be_sent_to_worker_processes(records, tmp_path):
    part = run(records, tmp_path / "out").test
    sent = pickle.dumps(part)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).image(1), part.image(1))


# ------------------------------------------------------------------------------------- reusing what is there


def test_equal_settings_are_not_written_again(records, tmp_path, monkeypatch):
    run(records, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr(prepared_module, "_write_dataset", None)
    again = run(records, tmp_path / "out")
    assert (again.folder / "manifest.json").stat().st_mtime_ns == before
    assert existing(tmp_path / "out", resize=20, settings=SETTINGS).train.keys == again.train.keys
    assert existing(tmp_path / "elsewhere", resize=20, settings=SETTINGS) is None


@pytest.mark.parametrize("change", [{"resize": 24}, {"settings": {**SETTINGS, "option": [1, 3]}}])
def test_other_settings_are_refused_and_named(records, tmp_path, change):
    run(records, tmp_path / "out")
    with pytest.raises(DataError, match="settings .*(resize 20 instead of 24|option )") as caught:
        run(records, tmp_path / "out", **change)
    assert "another folder" in str(caught.value)


def test_changed_source_is_noticed(records, tmp_path):
    run(records, tmp_path / "out")
    with pytest.raises(DataError, match="source has changed"):
        run(records[:-1], tmp_path / "out")


def test_incomplete_leftover_is_replaced(records, tmp_path):
    run(records, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "dataset" / "train" / "state.json").unlink()
    with pytest.raises(DataError, match="manifest"):
        load_prepared(tmp_path / "out")
    assert len(run(records, tmp_path / "out").train) == 9


def test_foreign_folder_is_never_replaced(records, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="thesis.txt"):
        run(records, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").exists()
    with pytest.raises(DataError, match="is a file"):
        run(records, tmp_path / "out" / "thesis.txt")


# -------------------------------------------------------------------------------------------------- bad input


def test_all_problems_at_once_and_nothing_written(records, tmp_path):
    records[1].path.write_bytes(records[1].path.read_bytes()[:300])
    records[2].path.unlink()
    bad = [
        *records,
        replace(records[0], captions=("", "a")),
        replace(records[4], key="a", split="dev"),
        replace(records[5], key="b", box=(400, 400, 9, 9)),
    ]
    with pytest.raises(DataError) as caught:
        run(bad, tmp_path / "out")
    message = str(caught.value)
    assert "6 problems" in message
    for expected in (
        "1.png: the image cannot be decoded",
        "2.png: the image file is missing",
        "image_0' occurs twice",
        "caption is empty",
        "'dev'",
        "lies outside the image",
    ):
        assert expected in message
    assert sorted(item.name for item in tmp_path.iterdir()) == ["source"]


def test_a_split_without_images_is_refused(records, tmp_path):
    with pytest.raises(DataError, match="test: the split has no image"):
        run([record for record in records if record.split == "train"], tmp_path / "out")


def test_failure_while_writing_leaves_nothing(records, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No workspace left on device")

    monkeypatch.setattr(prepared_module, "_save", full)
    with pytest.raises(DataError, match="cannot be written.*No workspace left"):
        run(records, tmp_path / "out")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["source"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda out: shutil.rmtree(out), "no such folder"),
        (lambda out: (out / "manifest.json").unlink(), "no manifest.json"),
        (lambda out: (out / "manifest.json").write_text("{"), "damaged"),
        (lambda out: (out / "manifest.json").write_text('{"format": 99}'), "format 99"),
        (lambda out: (out / "manifest.json").write_text('{"format": 1}'), "damaged"),
        (lambda out: next((out / "dataset" / "train").glob("*.arrow")).unlink(), "damaged or incomplete"),
        (lambda out: truncate(next((out / "dataset" / "test").glob("*.arrow"))), "damaged or incomplete"),
        (
            lambda out: shutil.copytree(out / "dataset" / "test", out / "dataset" / "train", dirs_exist_ok=True),
            "manifest says",
        ),
    ],
)
def test_damaged_folders_are_named_with_the_mend(records, tmp_path, damage, says):
    run(records, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=says) as caught:
        load_prepared(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value) and "prepare" in str(caught.value)


def test_one_changed_bit_of_the_data_is_named(records, tmp_path):
    prepared = run(records, tmp_path / "out")
    check_files(prepared)
    path = next((tmp_path / "out/dataset/train").glob("*.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    opened = load_prepared(tmp_path / "out")  # Arrow does not notice
    with pytest.raises(DataError, match=f"out: changed since it was prepared: dataset/train/{path.name}; delete"):
        check_files(opened)
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        check_files(opened)


def test_data_of_before_digests_are_read_as_they_are(records, tmp_path):
    prepared = run(records, tmp_path / "out")
    del prepared.manifest["files"]
    check_files(prepared)
