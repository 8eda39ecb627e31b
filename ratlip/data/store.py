"""Arrays on disk that are computed once: caption embeddings, features of images."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from ratlip.cache import digest, file_digest
from ratlip.files import named, read_json, write_json
from ratlip.progress import bar

RECORD_EVERY = 8  # batches between two records of how far a Store is


class Store:
    """Arrays of `rows` rows each in the folder `<home>/<prefix>-<hash of identity>`, filled in order.

    Memory does not grow with their number, and an interrupted filling goes on where it was. `identity`: what the
    values depend on. `columns`: name -> shape of a row and its dtype, e.g. {"features": ((512,), "float32")}.
    progress.json says how many rows are done; it is written after them, so that a row it counts is there. With the last
    row come the SHA-256 of the files: what has changed since is filled anew, with a warning.
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
        with named(self.folder):
            made = {n: create(files[n], "w+", dtype, (self.rows, *shape)) for n, (shape, dtype) in self.columns.items()}
        if hasattr(os, "posix_fallocate"):  # a mapped file whose disk fills up later kills the process, without a word
            for path in files.values():
                with named(path), path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, max(1, path.stat().st_size))
        return made

    def _changed(self) -> list[str]:
        """Files of a complete store that are not as they were written; none where none was noted (stores of before)."""
        noted = read_json(self.folder / "progress.json").get("sha256", {})
        sums = {name: file_digest(self.folder / f"{name}.npy") for name in self.columns} if noted else {}
        return [
            f"{name}.npy" for name, found in sums.items() if not isinstance(noted, dict) or noted.get(name) != found
        ]

    def fill(
        self, read: Callable[[np.ndarray], dict], batch_size: int, *, desc: str = "features", progress: bool = True
    ) -> Store:
        """Fill the missing rows: `read(row numbers (B,))` -> {column: B rows}. Returns at once where none is.

        One process at a time; another that wants the same rows waits, and finds them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock"):
            done = self.done
            if done == self.rows:
                if not (changed := self._changed()):
                    return self
                names = ", ".join(changed)
                warnings.warn(f"{self.folder}: {names} changed since it was written; computed anew", stacklevel=2)
                done = 0
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
                    note: dict[str, Any] = {"done": stop, "identity": self.identity}
                    if stop == self.rows:
                        note["sha256"] = {name: file_digest(self.folder / f"{name}.npy") for name in arrays}
                    write_json(self.folder / "progress.json", note)
        return self

    def __getitem__(self, name: str) -> np.ndarray:
        """A column (rows, ...), memory-mapped: only what is looked at is read. Writing to it changes no file."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="c")


def blocks(array: np.ndarray, size: int = 2048) -> Iterator[np.ndarray]:
    """The rows of an array in float64, `size` at a time."""
    for start in range(0, len(array), size):
        yield np.asarray(array[start : start + size], dtype=np.float64)
