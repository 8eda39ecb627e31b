"""Atomic writes: whole or absent, and nothing left over."""

import json
import subprocess
import sys

import pytest

from ratlip.files import atomic_path, read_json, write_json, write_text


def fill(folder, text):
    folder.mkdir()
    (folder / "a").write_text(text)


def test_a_file_replaces_a_file(tmp_path):
    for text in ("old", "new"):
        with atomic_path(tmp_path / "x.txt") as draft:
            draft.write_text(text)
            assert draft.suffix == ".txt"  # writers choose the format by the name
    assert (tmp_path / "x.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_a_folder_replaces_a_folder_wholly(tmp_path):
    fill(tmp_path / "x", "old")
    (tmp_path / "x" / "only in the old one").touch()
    with atomic_path(tmp_path / "x") as draft:
        fill(draft, "new")
        assert (tmp_path / "x" / "a").read_text() == "old"  # until the end
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a"]
    assert (tmp_path / "x" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("make", [lambda path: path.write_text("new"), lambda path: fill(path, "new")])
def test_an_error_leaves_the_old_and_nothing_else(tmp_path, make, error):
    (tmp_path / "x").write_text("old")
    with pytest.raises(error):
        with atomic_path(tmp_path / "x") as draft:
            make(draft)
            raise error
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failed_last_step_puts_the_old_folder_back(tmp_path, monkeypatch):
    fill(tmp_path / "x", "old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        with atomic_path(tmp_path / "x") as draft:
            fill(draft, "new")
    assert (tmp_path / "x" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_draft_that_was_never_written_is_an_error_and_keeps_the_old(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileNotFoundError):
        with atomic_path(tmp_path / "x"):
            pass
    assert (tmp_path / "x").read_text() == "old"


def test_folders_above_are_made_and_json_comes_back(tmp_path):
    path, value = tmp_path / "a" / "b" / "x.json", {"ö": [1, 2.5, None], "path": "p"}
    write_json(path, value)
    assert read_json(path) == value and path.read_text().endswith("}\n")
    write_text(path, "[1]")
    assert json.loads(path.read_text()) == [1]


FULL = """
import resource, sys, numpy, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
from pathlib import Path
from ratlip import cli, files
from ratlip.data.store import Store
from ratlip.training import log

def whole(path):
    files.write_text(path, "x" * 2**18)

def weights(path):
    with files.atomic_path(path) as draft:
        torch.save(torch.zeros(2**18), draft)

def row(path):
    log.append(path, {"x": "x" * 2**18})

def store(path):
    Store(path, "f", {}, 2**10, {"a": ((256,), "float32")}).fill(lambda n: {"a": numpy.ones((len(n), 256))}, 64)

try:
    globals()[sys.argv[1]](Path(sys.argv[2]))
except OSError as error:
    print(error.errno in cli.REFUSED, error.filename)
"""


@pytest.mark.parametrize("what", ["whole", "weights", "row", "store"])
def test_a_file_that_may_grow_no_further_is_named_and_what_was_there_stays(tmp_path, what):
    old = tmp_path / "x"
    if what in ("whole", "weights"):
        old.write_text("old")
    words = [sys.executable, "-c", FULL, what, str(old)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"True {old}"), done.stdout
    if what in ("whole", "weights"):
        assert old.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["x"]
