"""Split files are read without running anything that is in them."""

import pickle
from pathlib import Path

import pytest

from ratlip.data.layout import load_names

NAMES = ["001.Albatross/Albatross_1", "002.Crow/Crow_2"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [list, tuple])
def test_names_of_any_protocol(tmp_path, protocol, kind):
    path = tmp_path / "filenames.pickle"
    path.write_bytes(pickle.dumps(kind(NAMES), protocol=protocol))
    assert load_names(path) == NAMES


def test_names_written_by_python_2(tmp_path):
    """Python 2 wrote its byte strings as SHORT_BINSTRING (U) or, in protocol 0, as quoted text (S)."""
    path = tmp_path / "filenames.pickle"
    text = b"001.Caf\xe9/1"
    path.write_bytes(b"\x80\x02]q\x00(U" + bytes([len(text)]) + text + b"q\x01U\x01aq\x02e.")
    assert load_names(path) == ["001.Café/1", "a"]
    path.write_bytes(b"(lp0\nS'001.Crow/1'\np1\naS'b'\np2\na.")
    assert load_names(path) == ["001.Crow/1", "b"]


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_does_nothing(tmp_path, protocol):
    target = tmp_path / "created"
    path = tmp_path / "filenames.pickle"
    path.write_bytes(pickle.dumps([*NAMES, Malicious(target)], protocol=protocol))
    with pytest.raises(ValueError, match="refused"):
        load_names(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())  # the ordinary loader would have fallen for it
    assert target.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps(NAMES)[:-7],
        pickle.dumps({"a": 1}),
        pickle.dumps([1, 2]),
        pickle.dumps("name"),
        b"\x80\x02Ppersistent\n.",
    ],
)
def test_anything_but_names_is_refused(tmp_path, content):
    path = tmp_path / "filenames.pickle"
    path.write_bytes(content)
    with pytest.raises(ValueError):
        load_names(path)
