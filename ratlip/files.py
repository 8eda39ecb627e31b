"""Files that are either whole or absent, and folders with one writer: everything ratlip writes goes through here."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ratlip.errors import BusyError, RunError

# All that torch and safetensors say where a disk or a limit takes no more
TORN = ("PytorchStreamWriter failed", "iostream error", "inline_container", "I/O error")


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on an error it goes.

    What is written to the temporary path may be a file or a folder. A reader sees the old content or the new, never a
    part: the last step is a rename (of two where a folder replaces a folder, as no system call does that).
    """
    with named(path), _draft(Path(path)) as draft:
        yield draft


@contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """An OSError of the block names `path` where it names no file; what torch raises on a full disk becomes one."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
    except Exception as error:
        if not any(sign in str(error) for sign in TORN):
            raise
        raise OSError(errno.ENOSPC, "only a part of it could be written", str(path)) from error


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    draft = holder / path.name
    try:
        yield draft
        replaced = holder / "replaced"
        if draft.is_dir() and path.is_dir():
            path.rename(replaced)  # a folder cannot be renamed onto a folder that is not empty
        try:
            os.replace(draft, path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def sweep(folder: Path, *names: str) -> None:
    """Remove what killed processes left of files `names` in `folder` (see `atomic_path`): for its one writer alone."""
    for name in names:
        for left in folder.glob(f"{name.rpartition('/')[0] or '.'}/.{name.rpartition('/')[2]}.????????"):
            shutil.rmtree(left, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with atomic_path(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as readable JSON to `path`, whole or not at all. RunError where a number is not finite."""
    try:
        text = json.dumps(value, indent=2, sort_keys=False, default=str, allow_nan=False)
    except ValueError as error:
        wrong = ", ".join(not_finite(value)) or error
        raise RunError(f"{path}: not written, for these numbers are not finite: {wrong}") from error
    write_text(path, text + "\n")


def not_finite(value: Any, name: str = "") -> list[str]:
    """The numbers in a nest of dicts and lists that are no results, by their dotted names: "real.recall=nan"."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [wrong for key, each in items for wrong in not_finite(each, f"{name}.{key}" if name else f"{key}")]
    return [f"{name}={value}"] if isinstance(value, float) and not math.isfinite(value) else []


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON from `path`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def is_object(path: str | os.PathLike) -> bool:
    """Whether `path` holds a JSON object: it is neither missing nor empty, cut short, or something else."""
    try:
        return isinstance(read_json(path), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _writer(note: Path) -> dict:
    """Who the note says is writing: process, machine, since; nothing where it is missing or not readable."""
    try:
        return {key: read_json(note)[key] for key in ("process", "machine", "since")}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


@contextmanager
def one_writer(folder: str | Path) -> Iterator[Callable[[], None]]:
    """Be the one process that writes into `folder`, or raise BusyError, which says who is. Waits for nobody.

    The lock is the kernel's (`flock` on the file `lock`, which stays): a process that dies loses it, however it dies,
    and the next one takes over. `writer.json` names the holder while there is one; it is a note for readers, not the
    lock. On a network file system the lock holds between machines only where the mount carries flock to the server
    (NFS 4, GPFS, Lustre with `flock`), and one of a machine that died lasts until the server's lease ends; with
    `nolock`, `local_lock` or `localflock` it holds between the processes of one machine. Therefore: a note that
    another machine left warns, and the function that is yielded raises RunError as soon as the note is not our own.
    """
    from filelock import FileLock, Timeout  # here: 0.04 s that `ratlip --help` need not wait for

    folder, me = Path(folder), {"process": os.getpid(), "machine": platform.node()}
    me["since"] = datetime.now().astimezone().isoformat(timespec="seconds")
    note, lock = folder / "writer.json", FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        found = _writer(note)
        other = "process {process} on {machine}, since {since}".format(**found) if found else "another process"
        mend = "wait until it has ended, or stop it; the same command then goes on"
        raise BusyError(f"{folder}: is being written by {other}; {mend}") from None
    except OSError as problem:
        mend = "choose another folder, or mend its rights"
        raise RunError(f"{folder}: cannot be written ({problem}); {mend}") from problem

    def still_ours() -> None:
        if (found := _writer(note)) != me:
            other = "process {process} on {machine}".format(**found) if found else "something that removed writer.json"
            raise RunError(f"{folder}: was taken over by {other}; this process ends, and leaves it alone")

    try:
        left = _writer(note)
        if left and left["machine"] != me["machine"]:
            who = f"process {left['process']} on {left['machine']}, which began at {left['since']} and never ended"
            warnings.warn(f"{folder}: taken over from {who}; stop it if it still works", stacklevel=3)
        write_json(note, me)
        yield still_ours
    finally:
        if _writer(note) == me:
            note.unlink()
        lock.release()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT (Ctrl-C) that come meanwhile go into a list, for whoever looks; a second one acts at once.

    In the main thread alone: no other one can take signals.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def back() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: Any) -> None:
        came.append(number)
        back()

    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, note)
        yield came
    finally:
        back()


def leading_out(root: str | Path) -> list[Path]:
    """The links below `root` whose targets lie outside of it, sorted. `root` itself may be a link."""
    home, found = os.path.realpath(root), []
    for folder, names, files in os.walk(root):  # which does not go through links
        links = [path for name in (*names, *files) if os.path.islink(path := os.path.join(folder, name))]
        found += [Path(link) for link in links if not Path(os.path.realpath(link)).is_relative_to(home)]
    return sorted(found)


def repository() -> Path:
    """The root of the repository: above the current folder, else around this file; else RunError."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1]):
        if (folder / "pyproject.toml").is_file() and (folder / "ratlip").is_dir():
            return folder
    raise RunError(f"{Path.cwd()}: not inside the ratlip repository; start from its root or from notebooks/")


def outputs_folder(profile: str, outputs: str | Path | None = None) -> Path:
    """Where all of a profile lies: `outputs`, else <profile> in $RATLIP_OUTPUTS or <repository>/outputs."""
    return repository() / (outputs or Path(os.environ.get("RATLIP_OUTPUTS") or "outputs") / Path(profile).stem)


def shown(path: Path) -> str:
    """The path as a reader at the repository root would type it."""
    path, root = Path(path).absolute(), repository()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
