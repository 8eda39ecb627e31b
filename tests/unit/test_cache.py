"""Identity and caching: digests, a folder of one identity; the store goes on where it was, believes nothing damaged."""

import hashlib
import json
import threading
import time

import numpy as np
import pytest
import torch

from ratlip import cache
from ratlip.data.store import Store, blocks
from ratlip.errors import RunError

IDENTITY = {"steps": 3, "model": {"blocks": (1, 2), "width": 8}}
COLUMNS = {"square": ((2,), "float32"), "odd": ((), "bool")}


# ---------------------------------------------------------------------------------------------- identity


def test_a_digest_changes_with_a_value_and_not_with_the_order_of_keys():
    assert cache.digest({"a": 1, "b": [2, 3]}) == cache.digest({"b": (2, 3), "a": 1}) == "fd28b174"
    assert cache.digest({"a": 1, "b": [2, 4]}) != cache.digest({"a": 1, "b": [2, 3]})
    assert cache.digest({"a": 1, "b": [2, 3]}, 12).startswith("fd28b174") and len(cache.digest([], 12)) == 12


def test_weights_have_a_digest_of_their_own():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert cache.weights_digest(first) != cache.weights_digest(second)
    second.load_state_dict(first.state_dict())
    assert cache.weights_digest(first) == cache.weights_digest(second) and len(cache.weights_digest(first)) == 12


def test_a_file_has_the_digest_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"bytes")
    assert cache.file_digest(tmp_path / "file") == hashlib.sha256(b"bytes").hexdigest()


def claim(folder, **changes):
    cache.claim(folder, {**IDENTITY, **changes}, what="a run", error=RunError, file="identity.json", sign="config.yaml")


def test_a_folder_belongs_to_the_first_that_claims_it(tmp_path):
    for _ in range(2):
        claim(tmp_path / "new")
    with pytest.raises(RunError, match="new: holds a run of other settings .steps 3 instead of 4.; choose another"):
        claim(tmp_path / "new", steps=4)
    with pytest.raises(RunError, match=r"\(model.width 8 instead of 9, model.blocks \[1, 2\] instead of None"):
        claim(tmp_path / "new", model={"width": 9})
    claim(tmp_path / "new")


@pytest.mark.parametrize("text", [None, "{", "[1, 2]"])
def test_a_folder_that_does_not_tell_whose_it_is_is_refused(tmp_path, text):
    claim(tmp_path)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "identity.json").unlink() if text is None else (tmp_path / "identity.json").write_text(text)
    with pytest.raises(
        RunError, match="identity.json: missing or damaged, so nothing tells what a run here is made of"
    ):
        claim(tmp_path)


# ------------------------------------------------------------------------------------------------- store


def read(rows):
    return {"square": np.stack([rows, rows**2], axis=1), "odd": rows % 2 == 1}


def check(store, rows=50):
    expected = read(np.arange(rows))
    for name in COLUMNS:
        np.testing.assert_array_equal(store[name], expected[name].astype(store[name].dtype))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, "test", {"of": "squares"}, 50, COLUMNS)


def test_a_store_holds_what_was_read_and_is_not_read_again(store):
    assert store.done == 0
    check(store.fill(read, 8, progress=False))
    assert store.done == 50
    store.fill(lambda rows: pytest.fail("it was there"), 8, progress=False)


def interrupted_after(batches):
    calls = []

    def reading(rows):
        calls.append(rows)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return read(rows)

    return reading


@pytest.mark.parametrize("batches, done", [(0, 0), (1, 0), (2, 16), (3, 16), (5, 32)])
def test_an_interrupted_reading_goes_on_after_the_last_record(store, monkeypatch, batches, done):
    monkeypatch.setattr("ratlip.data.store.RECORD_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        store.fill(interrupted_after(batches), 8, progress=False)
    assert store.done == done
    seen = []
    store.fill(lambda rows: (seen.extend(rows), read(rows))[1], 8, progress=False)
    assert seen == list(range(done, 50))
    check(store)


def test_another_identity_is_another_folder(store, tmp_path):
    store.fill(read, 8, progress=False)
    for other in (
        Store(tmp_path, "test", {"of": "cubes"}, 50, COLUMNS),
        Store(tmp_path, "test", {"of": "squares"}, 49, COLUMNS),
    ):
        assert other.folder != store.folder and other.done == 0


def torn(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    "name, harm",
    [
        ("square.npy", torn),
        ("square.npy", lambda path: path.unlink()),
        ("progress.json", torn),
        ("odd.npy", lambda path: np.save(path, np.zeros(7))),
        ("progress.json", lambda path: path.write_text(path.read_text().replace("squares", "cubes"))),
        ("progress.json", lambda path: path.write_text(json.dumps([50]))),
    ],
)
def test_a_damaged_store_is_filled_anew(store, name, harm):
    store.fill(read, 8, progress=False)
    harm(store.folder / name)
    assert store.done == 0
    check(store.fill(read, 8, progress=False))


def flipped(path, at=-9):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["square.npy", "odd.npy"])
def test_one_changed_bit_is_found_named_and_mended(store, name):
    store.fill(read, 8, progress=False)
    flipped(store.folder / name)
    assert store.done == 50  # the array's form is right: without the digest nobody would notice
    with pytest.warns(UserWarning, match=f"{store.folder.name}: {name} changed since it was written; computed anew"):
        check(store.fill(read, 8, progress=False))
    store.fill(lambda rows: pytest.fail("it was there"), 8, progress=False)


def test_a_store_of_before_digests_is_read_as_it_is(store):
    store.fill(read, 8, progress=False)
    note = store.folder / "progress.json"
    content = json.loads(note.read_text())
    del content["sha256"]
    note.write_text(json.dumps(content))
    store.fill(lambda rows: pytest.fail("it was there"), 8, progress=False)


def test_two_that_want_the_same_do_the_work_once(store):
    seen = []

    def slowly(rows):
        time.sleep(0.02)
        seen.extend(rows)
        return read(rows)

    both = [threading.Thread(target=store.fill, args=(slowly, 8), kwargs={"progress": False}) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert sorted(seen) == list(range(50))
    check(store)


def test_what_is_done_with_a_column_does_not_change_the_file(store):
    store.fill(read, 8, progress=False)
    store["square"][:] = -1
    check(store)


def test_blocks_are_the_rows_in_float64():
    array = np.arange(10, dtype=np.float32).reshape(5, 2)
    parts = list(blocks(array, 2))
    assert [len(part) for part in parts] == [2, 2, 1] and parts[0].dtype == np.float64
    np.testing.assert_array_equal(np.concatenate(parts), array)
