"""Identity and caching: digests, whose a folder is, and arrays on disk that are computed once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from filelock import FileLock

from ratlip.errors import RatlipError
from ratlip.files import read_json, write_json
from ratlip.progress import bar

if TYPE_CHECKING:
    from torch import nn

RECORD_EVERY = 8  # batches between two records of how far a Store is


def digest(content: dict | list, length: int = 8) -> str:
    """The first `length` hex digits of a SHA-256 that changes with any value in `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:length]


def weights_digest(module: nn.Module) -> str:
    """12 hex digits of all weights of a network (name, shape, type, values), whatever device they are on."""
    import torch  # here, so that the command line's help (settings import this module) does not load it: 0.9 s

    sha = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        sha.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:12]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits, without reading it into memory at once."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(found: dict, identity: dict) -> list[str]:
    """One text for each value that differs, "key FOUND instead of WANTED"; keys within sections are dotted."""
    there, wanted = dotted(found), dotted(json.loads(json.dumps(identity, default=str)))
    keys = dict.fromkeys([*wanted, *there])
    return [f"{k} {there.get(k)} instead of {wanted.get(k)}" for k in keys if there.get(k) != wanted.get(k)]


def dotted(content: dict, depth: float = math.inf, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names; `depth` dots at most."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        inner = isinstance(value, dict) and depth
        flat |= dotted(value, depth - 1, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def check_identity(folder: str | Path, found: dict, identity: dict, *, what: str, error: type[RatlipError]) -> None:
    """Raise `error` where `found`, which `folder` says of `what` it holds, is not `identity`."""
    if different := differences(found, identity):
        listed = ", ".join(different)
        raise error(f"{folder}: holds {what} of other settings ({listed}); choose another folder or delete this one")


def claim(
    folder: str | Path, identity: dict, *, what: str, error: type[RatlipError], file: str, sign: str = ""
) -> None:
    """A folder belongs to one identity: write `identity` (JSON values) to `folder`/`file`, or check what is there.

    Raises `error` (which calls the content `what`, e.g. "a run") where the folder belongs to another identity, or
    where `file` is damaged, or missing beside `sign`, a file that only a claimed folder holds.
    """
    path = Path(folder) / file
    if not path.exists() and not (sign and (path.parent / sign).exists()):
        write_json(path, identity)
        return
    try:
        found = dict(read_json(path))
    except (OSError, ValueError, TypeError) as problem:
        mend = f"so nothing tells what {what} here is made of; choose another folder or delete this one"
        raise error(f"{path}: missing or damaged, {mend}") from problem
    check_identity(path.parent, found, identity, what=what, error=error)


class Store:
    """Arrays of `rows` rows each in the folder `<home>/<prefix>-<hash of identity>`, filled in order.

    Memory does not grow with their number, and an interrupted filling goes on where it was. `identity`: what the
    values depend on. `columns`: name -> shape of a row and its dtype, e.g. {"features": ((512,), "float32")}.
    progress.json says how many rows are done; it is written after them, so that a row it counts is there.
    """

    def __init__(
        self, home: str | Path, prefix: str, identity: dict, rows: int, columns: dict[str, tuple[tuple[int, ...], str]]
    ):
        self.identity = json.loads(json.dumps({**identity, "rows": rows, "columns": columns}, default=str))
        self.folder = Path(home) / f"{prefix}-{digest(self.identity)}"
        self.rows, self.columns = rows, columns

    @property
    def done(self) -> int:
        """Rows that are there: 0 where the folder is missing, damaged, or of another identity."""
        try:
            record = read_json(self.folder / "progress.json")
            return int(record["done"]) if record["identity"] == self.identity and self._open("r") else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _open(self, mode: Literal["r", "r+"]) -> dict[str, Any]:
        arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode=mode) for name in self.columns}
        for name, (shape, dtype) in self.columns.items():
            if arrays[name].shape != (self.rows, *shape) or arrays[name].dtype != np.dtype(dtype):
                raise ValueError(f"{self.folder / name}.npy: is another array")
        return arrays

    def _create(self) -> dict[str, Any]:
        (self.folder / "progress.json").unlink(missing_ok=True)
        create = np.lib.format.open_memmap
        files = {name: self.folder / f"{name}.npy" for name in self.columns}
        return {n: create(files[n], "w+", dtype, (self.rows, *shape)) for n, (shape, dtype) in self.columns.items()}

    def fill(
        self, read: Callable[[np.ndarray], dict], batch_size: int, *, desc: str = "features", progress: bool = True
    ) -> Store:
        """Fill the missing rows: `read(row numbers (B,))` -> {column: B rows}. Returns at once where none is.

        One process at a time; another that wants the same rows waits, and finds them.
        """
        if self.done == self.rows:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock"):
            done = self.done
            arrays = self._open("r+") if done else self._create()
            starts = range(done, self.rows, batch_size)
            for number, start in enumerate(bar(starts, desc=desc, unit="batch", enabled=progress), start=1):
                stop = min(start + batch_size, self.rows)
                found = read(np.arange(start, stop))
                for name, array in arrays.items():
                    array[start:stop] = np.asarray(found[name])
                if number % RECORD_EVERY == 0 or stop == self.rows:
                    for array in arrays.values():
                        array.flush()
                    write_json(self.folder / "progress.json", {"done": stop, "identity": self.identity})
        return self

    def __getitem__(self, name: str) -> np.ndarray:
        """A column (rows, ...), memory-mapped: only what is looked at is read. Writing to it changes no file."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="c")


def blocks(array: np.ndarray, size: int = 2048) -> Iterator[np.ndarray]:
    """The rows of an array in float64, `size` at a time."""
    for start in range(0, len(array), size):
        yield np.asarray(array[start : start + size], dtype=np.float64)
