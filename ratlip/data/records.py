"""What every dataset reader hands on: records, a list of all that is wrong, and one way to open an image."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ratlip.errors import DataError

SPLITS = ("train", "test")
VALIDATION = "validation"  # the split that a set may have beside: learning rates are chosen on it, no verdict uses it
SHOWN = 50  # problems listed in full; the rest is counted
BOX_OVERSHOOT = 0.2  # official CUB boxes overshoot the image by up to 7 % of the box; much more is a mistake

Box = tuple[float, float, float, float]  # x, y, width, height in pixels


@dataclass(frozen=True)
class Record:
    """One captioned image, not yet decoded.

    A record has either a path or pixels. A synthetic one also says what its image shows (attributes), and where (mask).
    """

    key: str  # unique and stable
    split: str  # "train", "test" or "validation"
    captions: tuple[str, ...]  # at least one, stripped, none empty
    label: int = -1  # class (birds, flowers), identity (faces), kind of object (synthetic), pair (scenes); -1 unknown
    path: Path | None = None
    pixels: np.ndarray | None = None  # uint8 (H,W,3) RGB
    box: Box | None = None  # in pixels of the image file, for `published_crop`
    attributes: dict[str, str] | None = None
    mask: np.ndarray | None = None  # bool (H,W)
    named: tuple[tuple[str, ...], ...] | None = None  # the attributes that each caption names; None: all, or unknown
    upright: bool = False  # turn the image as its EXIF says; not in the published sets, whose readers did not

    @property
    def where(self) -> str:
        """What a message calls this record: the image file, or the key."""
        return str(self.path or self.key)


class Records(list[Record]):
    """A list of Record with `about`: how it came about (rule of the split, counts), for the manifest."""

    def __init__(self, records: Iterable[Record] = (), about: dict[str, Any] | None = None):
        super().__init__(records)
        self.about = dict(about or {})


class Problems:
    """Everything that is wrong with a dataset, collected so that one message can list it all."""

    def __init__(self, subject: str = "the dataset"):
        self.subject = subject
        self.found: list[str] = []

    def add(self, path: str | os.PathLike, message: str) -> None:
        self.found.append(f"{path}: {message}")

    def add_repeated(self, path: str | os.PathLike, names: Iterable[str]) -> None:
        """Note the names that occur more than once in the file at `path`."""
        for name, count in Counter(names).items():
            if count > 1:
                self.add(path, f"{name} occurs twice")

    def __len__(self) -> int:
        return len(self.found)

    def raise_if_any(self) -> None:
        """Raise DataError that lists the problems, each with its path (the first 50, and how many more)."""
        if self.found:
            title = f"{len(self)} problem{'s' if len(self) > 1 else ''} in {self.subject}; nothing was written:"
            more = [f"... and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
            raise DataError("\n  ".join([title, *self.found[:SHOWN], *more]))


def in_order(work: Callable, items: Iterable, workers: int | None = None) -> Iterator:
    """Yield `work(item)` in the order of `items`, computed by threads, never more than a few items ahead.

    Threads, because Pillow and hashlib let go of the interpreter lock. `Executor.map` would read all items at once.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or cores
    ahead: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def published_crop(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a bird's crop as published: a square 1.5 boxes wide, clipped to the image.

    The rule of the text-to-image line since AttnGAN, to the pixel (official.md: "birds are first cropped to a square
    about 1.5 boxes wide"). Where the image ends earlier the crop ends with it and is no square.
    """
    x, y, box_width, box_height = (int(number) for number in box)
    r = int(max(box_width, box_height) * 0.75)
    cx, cy = int((2 * x + box_width) / 2), int((2 * y + box_height) / 2)
    return max(0, cx - r), max(0, cy - r), min(width, cx + r), min(height, cy + r)


def _check_box(box: Box, width: int, height: int) -> None:
    x, y, w, h = box
    numbers = f"box x={x:g} y={y:g} width={w:g} height={h:g}"
    if not (w >= 1 and h >= 1):
        raise ValueError(f"{numbers} is empty")
    if not max(max(-x, x + w - width) / w, max(-y, y + h - height) / h) <= BOX_OVERSHOOT:  # also true of nan
        raise ValueError(f"{numbers} lies outside the image of {width}x{height} pixels")


def _decode(record: Record) -> Image.Image:
    """The whole image of the record in RGB."""
    pixels = record.pixels
    if pixels is not None and record.path is None:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"pixels must be uint8 (H,W,3), not {pixels.dtype} {pixels.shape}")
        return Image.fromarray(np.ascontiguousarray(pixels))
    if record.path is None or pixels is not None:
        raise ValueError("a record needs either a path or pixels")
    try:
        with Image.open(record.path) as file:
            return _eight_bits(ImageOps.exif_transpose(file) if record.upright else file).convert("RGB")
    except FileNotFoundError:
        raise ValueError("the image file is missing") from None
    except Exception as error:  # Pillow raises a dozen classes for damaged files, not all of them OSError
        raise ValueError(f"the image cannot be decoded ({error})") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits scaled to 8 (Pillow's `convert` would cut them off at 255: white); others as they are."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, whose range nobody knows; save it with 8 or 16 bits a channel")
    return image


def open_image(record: Record) -> tuple[Image.Image, Image.Image | None]:
    """The record's image in RGB and its mask (mode "L", 0 and 255) or None, cropped as published if it has a box.

    Raises ValueError that says what is wrong; the caller adds the path.
    """
    image, mask = _decode(record), None
    if record.mask is not None:
        if record.mask.shape != (image.height, image.width):
            raise ValueError(f"the mask has shape {record.mask.shape}, the image {image.height, image.width}")
        mask = Image.fromarray(record.mask.astype(np.uint8) * 255)
    if record.box is not None:
        _check_box(record.box, *image.size)
        crop = published_crop(record.box, *image.size)
        image, mask = image.crop(crop), mask and mask.crop(crop)
    return image, mask
