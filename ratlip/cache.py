"""What is read off images, streamed to disk: memory does not grow with their number, and an interrupted
reading goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from filelock import FileLock
from torch import nn

from ratlip.files import read_json, write_json
from ratlip.progress import bar

RECORD_EVERY = 8  # batches between two records of how far it is


def digest(content: dict | list) -> str:
    """8 hex digits that change with any value in `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def weights_digest(module: nn.Module) -> str:
    """12 hex digits of all weights of a network, whatever device they are on."""
    sha = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        sha.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:12]


class Store:
    """Arrays of `rows` rows each in the folder `<home>/<prefix>-<hash of identity>`, filled in order.

    `identity`: what the values depend on; another identity is another folder. `columns` maps a name to the
    shape of a row and its dtype, e.g. {"features": ((512,), "float32")}. progress.json says how many rows are
    done; it is written after them, so that a row it counts is there.
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

    def _open(self, mode: str) -> dict[str, np.ndarray]:
        arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode=mode) for name in self.columns}
        for name, (shape, dtype) in self.columns.items():
            if arrays[name].shape != (self.rows, *shape) or arrays[name].dtype != np.dtype(dtype):
                raise ValueError(f"{self.folder / name}.npy: is another array")
        return arrays

    def _create(self) -> dict[str, np.ndarray]:
        (self.folder / "progress.json").unlink(missing_ok=True)
        return {
            name: np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", dtype, (self.rows, *shape))
            for name, (shape, dtype) in self.columns.items()
        }

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
