"""Identity: digests, and whose a folder is."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratlip.errors import RatlipError
from ratlip.files import read_json, write_json

if TYPE_CHECKING:
    from torch import nn


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


def check_archive(path: str | Path) -> None:
    """ValueError where a part of a file of `torch.save` is not as it was written.

    Such a file is a ZIP archive and holds a CRC-32 of each part, which `torch.load` does not look at.
    """
    with zipfile.ZipFile(path) as archive:
        if wrong := archive.testzip():
            raise ValueError(f"{wrong} changed since it was written")


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
