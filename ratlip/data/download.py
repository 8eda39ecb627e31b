"""Fetching what has a stable public address and a checksum, and saying where the rest comes from.

Public are the images of CUB-200-2011 and Oxford-102. The captions of Reed et al. (Google Drive) and CelebA (whose terms
each user must accept) are fetched by hand, and `instructions` says how.
"""

from __future__ import annotations

import shutil
import tarfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import pooch
import requests

from ratlip.data.layout import Remote, Source
from ratlip.errors import DataError
from ratlip.files import atomic_path
from ratlip.progress import bar as progress_bar
from ratlip.settings import DataSettings
from ratlip.settings.sections import GENERATED

ARCHIVES = (".tgz", ".tar.gz", ".tar")
NAMES = get_args(DataSettings.model_fields["dataset"].annotation)  # each has a module of its own, its reader
SOURCES: dict[str, Source] = {
    name: import_module(f"ratlip.data.{name}").SOURCE for name in NAMES if name not in (*GENERATED, "folder")
}


def _source(dataset: str) -> Source:
    if dataset not in SOURCES:
        raise DataError(f"dataset {dataset!r} is not known; choose one of {', '.join(SOURCES)}")
    return SOURCES[dataset]


def instructions(dataset: str) -> str:
    """What to fetch from where for "birds", "flowers" or "faces", and a picture of the finished root."""
    source = _source(dataset)
    fetched = [f"  {each.url}  ({decimal(each.size)}, {each.checksum})" for each in source.fetched]
    automatic = [f"Fetched by `ratlip download {dataset}`:", *fetched] if fetched else []
    return "\n".join([*automatic, source.by_hand, "The finished folder:", source.layout])


def announced(dataset: str, root: str | Path) -> list[str]:
    """What `download` is about to do, in lines: each file with its size and what of it is here; licence; disk space.

    Raises DataError where the disk has too little space for what is still to come and to be unpacked.
    """
    source, root = _source(dataset), Path(root).expanduser()
    lines, to_come, unpacked = [f"{source.name}. {source.licence}"], 0, 0
    for remote in source.fetched:
        name, whole = remote.url.rsplit("/", 1)[-1], decimal(remote.size)
        part, archive = root / f"{name}.part", root / name
        there = next((path.stat().st_size for path in (archive, part) if path.is_file()), 0)
        if (root / remote.gives).exists():
            lines.append(f"  {name}: {whole}, not needed: {remote.gives} is here")
            continue
        goes_on = f", {decimal(there)} are here: it goes on from there" if there else ""
        lines.append(f"  {name}: {whole}{goes_on}, from {urlsplit(remote.url).hostname}")
        to_come += max(0, remote.size - there)
        unpacked += remote.size if name.endswith(ARCHIVES) else 0  # photographs: their archive is hardly smaller
    if not source.fetched:
        lines.append("  nothing of it has a public address without conditions: all by hand")
    home = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    if (needed := to_come + unpacked) > (free := shutil.disk_usage(home).free):
        raise DataError(f"{root}: {decimal(needed)} are needed there, {decimal(free)} are free; choose another disk")
    return [*lines, f"  needed on the disk meanwhile: {decimal(needed)}"] if needed else lines


def decimal(size: int) -> str:
    """Bytes in words: 502 B, 345 MB, 1.15 GB."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.3g} {unit}"
    return f"{size} B"


def missing(dataset: str, root: str | Path) -> list[str]:
    """What `root` still lacks of `dataset`, as paths relative to it; empty when all is there."""
    source = _source(dataset)
    needed = [*((remote.gives,) for remote in source.fetched), *source.needed]
    return [" or ".join(row) for row in needed if not any((Path(root) / name).exists() for name in row)]


def download(dataset: str, root: str | Path, *, progress: bool = True, keep_archives: bool = False) -> list[str]:
    """Fetch into `root` what has a public address, check it, unpack it; return what is still `missing`.

    What is there already is left alone. A broken download goes on where it stopped, in this call and in the next.
    Raises DataError: no network, wrong checksum, an archive that is not what it should be.
    """
    root = Path(root).expanduser()
    for remote in _source(dataset).fetched:
        if (root / remote.gives).exists():
            continue
        root.mkdir(parents=True, exist_ok=True)
        file = _fetch(remote, root, progress)
        if file.name.endswith(ARCHIVES):
            unpack(file, root, remote.gives)
            if not keep_archives:
                file.unlink()
    return missing(dataset, root)


def _fetch(remote: Remote, root: Path, progress: bool) -> Path:
    """The checked file in `root`; one that is there with the right checksum is taken as it is."""
    pooch.get_logger().setLevel("WARNING")  # its notes on each step would break the progress bar
    url, checksum, name = remote.url, remote.checksum, remote.url.rsplit("/", 1)[-1]
    by_hand = f"or fetch {url} elsewhere, put it into {root} and run this again"
    downloader = ResumingDownloader(root / f"{name}.part", progress)
    try:
        return Path(pooch.retrieve(url, checksum, name, root, downloader=downloader))
    except requests.HTTPError as error:
        wrong = f"the server answered {getattr(error.response, 'status_code', None)}; try again later"
        raise DataError(f"{url}: {wrong}, {by_hand}") from error
    except requests.RequestException as error:
        wrong = "cannot be reached, or the connection broke off (is there a network?); what has come so far is kept"
        raise DataError(f"{urlsplit(url).hostname} {wrong}: run this again, {by_hand}") from error
    except ValueError as error:  # pooch: the checksum differs; it has removed the file
        wrong = f"what came has not the checksum {checksum} and was removed; run this again"
        raise DataError(f"{url}: {wrong}, {by_hand}") from error
    except OSError as error:
        raise DataError(f"{root / name}: cannot be written ({error})") from error


class ResumingDownloader:
    """A downloader for pooch that goes on where an earlier or broken-off download stopped, as pooch's own does not.

    It writes to `part`, asks the server for the rest by an HTTP Range, and moves the file to where pooch checks it.
    """

    def __init__(self, part: Path, progress: bool = True, attempts: int = 3):
        self.part, self.progress, self.attempts = Path(part), progress, attempts

    def __call__(self, url: str, output_file: str, pooch) -> None:
        """Fetch `url` to `output_file`; raises RequestException after `attempts` without a new byte."""
        failures, complete = 0, False
        while not complete:
            before = self._have()
            try:
                complete = self._get_rest(url)
            except requests.RequestException as error:
                failures = 0 if self._have() > before else failures + 1
                if isinstance(error, requests.HTTPError) or failures >= self.attempts:
                    raise
                time.sleep(failures)
        shutil.move(self.part, output_file)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _get_rest(self, url: str) -> bool:
        """Append what is not there yet; False where the part is of no use, is gone, and all must come anew."""
        have = self._have()
        # identity: a compressed transfer would make byte positions meaningless
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=30) as response:
            if response.status_code == 416:  # nothing after these bytes: all is there, or it was another file
                complete = response.headers.get("Content-Range", "").endswith(f"/{have}")
                if not complete:
                    self.part.unlink()
                return complete
            response.raise_for_status()
            start = have if response.status_code == 206 else 0  # 200: the server knows no ranges and sends all
            total = start + int(response.headers.get("Content-Length", 0)) or None
            size: dict[str, Any] = {"total": total, "initial": start, "unit": "B", "unit_scale": True}
            shown = progress_bar(desc=self.part.stem, **size, enabled=self.progress)
            with open(self.part, "ab" if start else "wb") as file, shown:
                for chunk in response.iter_content(1 << 16):
                    shown.update(file.write(chunk))
        return True


def unpack(archive: str | Path, root: str | Path, wanted: str) -> Path:
    """Take the folder or file `wanted` out of a tar archive into `root`, whole or not at all.

    Members that point outside (absolute paths, "..", links) are refused with DataError.
    """
    archive, root = Path(archive), Path(root)
    try:
        with atomic_path(root / wanted) as draft, tarfile.open(archive) as tar:
            tar.extractall(draft.parent, filter="data")
            if not draft.exists():
                raise DataError(f"{archive}: holds no {wanted}")
    except (tarfile.TarError, EOFError, OSError) as error:  # OSError: also gzip's own, and a full disk
        raise DataError(f"{archive}: cannot be unpacked ({error})") from error
    return root / wanted
