"""Fetching what has a stable public address and a checksum, and saying where the rest comes from.

Public and checked here: the CUB-200-2011 images and the Oxford-102 images. The captions of Reed et al. lie on
Google Drive, CelebA asks each user to agree to its terms: those are fetched by hand, and `instructions` says
how.
"""

from __future__ import annotations

import shutil
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ratlip.data import birds, faces, flowers
from ratlip.errors import DataError
from ratlip.files import atomic_path
from ratlip.progress import bar as progress_bar


@dataclass(frozen=True)
class Remote:
    """A file with a public address, its checksum as pooch writes it, and what it becomes in the dataset root.

    gives: the file or folder that is there afterwards, relative to the root; for an archive, the one thing
    taken out.
    """

    url: str
    checksum: str
    gives: str

    @property
    def name(self) -> str:
        return urlsplit(self.url).path.rsplit("/", 1)[-1]

    @property
    def is_archive(self) -> bool:
        return self.name.endswith((".tgz", ".tar.gz", ".tar"))


OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
REGISTRY: dict[str, tuple[Remote, ...]] = {
    # CaltechDATA record 20098. The sha256 is torchvision's (prototype/datasets/_builtin/cub200.py); the file
    # has the md5 97eceeb196236b17998738112f37df78 that most other loaders state, and 1,150,585,339 bytes.
    "birds": (
        Remote(
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            "sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
            "CUB_200_2011",
        ),
    ),
    # Both md5 are those of torchvision.datasets.Flowers102 (a test compares them).
    "flowers": (
        Remote(OXFORD + "102flowers.tgz", "md5:52808999861908f626f3c1f4e79d11fa", "jpg"),
        Remote(OXFORD + "imagelabels.mat", "md5:e0620be6f572b9609742df49c70aed4d", "imagelabels.mat"),
    ),
    "faces": (),
}
BY_HAND = {
    "birds": """\
By hand, into the same folder:
  1. The captions of Reed et al. (2016) and the class-disjoint split, as AttnGAN packs them: follow
     "preprocessed metadata for birds" in the README of https://github.com/taoxugit/AttnGAN (Google Drive),
     and unpack it (and the text.zip in it, if there is one). It gives text/, train/filenames.pickle and
     test/filenames.pickle.""",
    "flowers": """\
By hand, into the same folder:
  1. The captions of Reed et al. (2016): follow "Download the birds and flowers data" (flowers) in the README
     of https://github.com/reedscot/cvpr2016 (Google Drive). It gives text_c10/; put trainvalclasses.txt and
     testclasses.txt beside it if they come with it, for the published split.""",
    "faces": """\
By hand (CelebA is for non-commercial research, and asks for agreement to its terms), from
https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html:
  1. img_align_celeba.zip ("Align&Cropped Images"), unpacked.
  2. list_attr_celeba.txt ("Attributes Annotations") and, if wanted, list_eval_partition.txt.
  3. identity_CelebA.txt ("Identities Annotations"); the identities may have to be asked for.""",
}
LAYOUTS = {"birds": birds.LAYOUT, "flowers": flowers.LAYOUT, "faces": faces.LAYOUT}
# What must be there besides what can be fetched; any one of the alternatives in a row will do.
NEEDED = {
    "birds": (("text",), ("train/filenames.pickle", "trainvalclasses.txt")),
    "flowers": (("text_c10",),),
    "faces": (("img_align_celeba",), ("list_attr_celeba.txt",), ("identity_CelebA.txt",)),
}


def _known(dataset: str) -> str:
    if dataset not in REGISTRY:
        raise DataError(f"dataset {dataset!r} is not known; choose one of {', '.join(REGISTRY)}")
    return dataset


def instructions(dataset: str) -> str:
    """What to fetch from where for "birds", "flowers" or "faces", and a picture of the finished root."""
    fetched = [f"  {remote.url}  ({remote.checksum})" for remote in REGISTRY[_known(dataset)]]
    automatic = [f"Fetched by `ratlip download {dataset}`:", *fetched] if fetched else []
    return "\n".join([*automatic, BY_HAND[dataset], "The finished folder:", LAYOUTS[dataset]])


def missing(dataset: str, root: str | Path) -> list[str]:
    """What `root` still lacks of `dataset`, as paths relative to it; empty when all is there."""
    root = Path(root)
    needed = [*((remote.gives,) for remote in REGISTRY[_known(dataset)]), *NEEDED[dataset]]
    return [" or ".join(row) for row in needed if not any((root / name).exists() for name in row)]


def download(
    dataset: str,
    root: str | Path,
    *,
    progress: bool = True,
    keep_archives: bool = False,
    registry: dict[str, tuple[Remote, ...]] | None = None,
) -> list[str]:
    """Fetch into `root` what has a public address, check it, unpack it; return what is still `missing`.

    What is there already is left alone. A broken download goes on where it stopped, in this call and in the
    next. Raises DataError: no network, wrong checksum, an archive that is not what it should be.
    """
    root = Path(root).expanduser()
    for remote in (registry or REGISTRY)[_known(dataset)]:
        if (root / remote.gives).exists():
            continue
        root.mkdir(parents=True, exist_ok=True)
        file = _fetch(remote, root, progress)
        if remote.is_archive:
            unpack(file, root, remote.gives)
            if not keep_archives:
                file.unlink()
    return missing(dataset, root)


def _fetch(remote: Remote, root: Path, progress: bool) -> Path:
    """The checked file in `root`; one that is there with the right checksum is taken as it is."""
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")  # its notes on each step would break the progress bar
    by_hand = f"or fetch {remote.url} elsewhere, put it into {root} and run this again"
    host = urlsplit(remote.url).hostname
    try:
        return Path(
            pooch.retrieve(
                remote.url,
                remote.checksum,
                remote.name,
                root,
                downloader=ResumingDownloader(root / f"{remote.name}.part", progress),
            )
        )
    except requests.HTTPError as error:
        raise DataError(
            f"{remote.url}: the server answered {error.response.status_code}; try again later, {by_hand}"
        ) from error
    except requests.RequestException as error:
        raise DataError(
            f"{host} cannot be reached, or the connection broke off (is there a network?); what "
            f"has come so far is kept: run this again, {by_hand}"
        ) from error
    except ValueError as error:  # pooch: the checksum differs; it has removed the file
        raise DataError(
            f"{remote.url}: what came has not the checksum {remote.checksum} and was removed; run this again, {by_hand}"
        ) from error
    except OSError as error:
        raise DataError(f"{root / remote.name}: cannot be written ({error})") from error


class ResumingDownloader:
    """A downloader for pooch that goes on where an earlier or broken-off download stopped.

    pooch's own gives its file a new random name in each call, so it must begin again each time. This one
    writes to `part`, asks the server for the rest by an HTTP Range, and moves the file to where pooch checks
    it.
    """

    def __init__(self, part: Path, progress: bool = True, attempts: int = 3, wait: float = 1.0, timeout: float = 30):
        self.part, self.progress = Path(part), progress
        self.attempts, self.wait, self.timeout = attempts, wait, timeout

    def __call__(self, url: str, output_file: str, pooch) -> None:
        """Fetch `url` to `output_file`; raises RequestException after `attempts` without a new byte."""
        import requests

        failures = 0
        while True:
            before = self._have()
            try:
                self._get_rest(url)
                break
            except requests.HTTPError:
                raise
            except requests.RequestException:
                failures = 0 if self._have() > before else failures + 1
                if failures >= self.attempts:
                    raise
                time.sleep(self.wait * failures)
        shutil.move(self.part, output_file)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _get_rest(self, url: str) -> None:
        import requests

        have = self._have()
        # identity: a compressed transfer would make byte positions meaningless
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=self.timeout) as response:
            if response.status_code == 416:  # nothing after these bytes: all is there, or it was another file
                if response.headers.get("Content-Range", "").endswith(f"/{have}"):
                    return
                self.part.unlink()
                return self._get_rest(url)
            response.raise_for_status()
            resumed = response.status_code == 206
            start = have if resumed else 0
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            with (
                open(self.part, "ab" if resumed else "wb") as file,
                progress_bar(
                    desc=self.part.stem, total=total, initial=start, unit="B", unit_scale=True, enabled=self.progress
                ) as bar,
            ):
                for chunk in response.iter_content(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))


def unpack(archive: str | Path, root: str | Path, wanted: str) -> Path:
    """Take the folder or file `wanted` out of a tar archive into `root`, whole or not at all.

    Members that point outside (absolute paths, "..", links) are refused with DataError.
    """
    archive, root = Path(archive), Path(root)
    try:
        with atomic_path(root / wanted) as draft:
            with tarfile.open(archive) as tar:
                _extract(tar, draft.parent)
            if not draft.exists():
                raise DataError(f"{archive}: holds no {wanted}")
    except (tarfile.TarError, EOFError, OSError) as error:  # OSError: also gzip's own, and a full disk
        raise DataError(f"{archive}: cannot be unpacked ({error})") from error
    return root / wanted


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    if hasattr(tarfile, "data_filter"):
        tar.extractall(folder, filter="data")
        return
    members = tar.getmembers()  # a Python before 3.10.12 and 3.11.4: the same refusals, spelled out
    for member in members:
        target = (folder / member.name).resolve()
        if not (member.isfile() or member.isdir()) or not target.is_relative_to(folder.resolve()):
            raise tarfile.TarError(f"{member.name!r} would be written outside the folder, or is a link")
    tar.extractall(folder, members)
