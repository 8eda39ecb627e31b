"""Training batches as a pure function of (seed, step), and the way from stored pixels to a network's input.

Nothing here carries state from one step to the next. That is why a run that was killed at any step goes on bit for bit,
whatever the number of loader processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ratlip.errors import DataError

if TYPE_CHECKING:
    from ratlip.data.prepared import Split

ORDER, DRAW = 11, 12  # streams of random numbers: the order of an epoch and the draws of a step share none


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, images: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(images)


class Batches(Dataset):
    """Item `step` is that step's batch: one caption of each image drawn at random, random crop, random flip.

    The images follow one another in epochs, each in an order of its own; a batch may straddle two epochs, so none is
    dropped. With several processes (`rank` of `world`) each takes its part of the global batch of `batch_size`, but all
    of its captions: a mismatched sentence is another image's.
    """

    def __init__(
        self, split: Split, *, crop: int, flip: bool, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ):
        if batch_size % world:
            wrong = f"batch_size={batch_size} cannot be shared by {world} processes"
            raise DataError(f"{wrong}; make it a multiple of {world}")
        self.split, self.crop, self.flip, self.batch_size, self.seed = split, crop, flip, batch_size, seed
        self.part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Of this part: images uint8 (P,3,crop,crop), image int64 (P,); caption int64 (B,): rows of `all_captions`."""
        draws = np.random.default_rng([self.seed, DRAW, step]).random((self.batch_size, 4))
        count, positions = len(self.split), range(step * self.batch_size, (step + 1) * self.batch_size)
        numbers = [int(_order(self.seed, position // count, count)[position % count]) for position in positions]
        own = numbers[self.part]
        pairs = zip(own, draws[self.part], strict=True)
        images = np.stack([random_crop(self.split.image(n), self.crop, self.flip, draw[1:]) for n, draw in pairs])
        first, last = self.split.caption_offsets[numbers], self.split.caption_offsets[np.array(numbers) + 1]
        captions = first + (draws[:, 0] * (last - first)).astype(np.int64)
        return dict(images=torch.from_numpy(images), caption=torch.from_numpy(captions), image=torch.tensor(own))


def cut(pixels: np.ndarray, top: int, left: int, side: int, mirrored: bool = False) -> np.ndarray:
    """(H,W,...) -> the square (side,side,...) whose corner is at `top`, `left`, mirrored or not: a view."""
    square = pixels[top : top + side, left : left + side]
    return square[:, ::-1] if mirrored else square


def random_crop(pixels: np.ndarray, crop: int, flip: bool, draw: np.ndarray) -> np.ndarray:
    """uint8 (H,W,3) -> a square of it, mirrored or not, as (3,crop,crop).

    `draw`: three numbers from [0,1), for top, left, and, with `flip`, whether it is mirrored.
    """
    top, left = (int(each * (side - crop + 1)) for each, side in zip(draw[:2], pixels.shape[:2], strict=True))
    return cut(pixels, top, left, crop, flip and draw[2] < 0.5).transpose(2, 0, 1)


def centre_crop(pixels: np.ndarray, crop: int) -> np.ndarray:
    """uint8 (H,W,3) -> the middle square (crop,crop,3): how real images enter the scores."""
    return cut(pixels, (pixels.shape[0] - crop) // 2, (pixels.shape[1] - crop) // 2, crop)


def to_network(images: Tensor, image_size: int, resize: str = "antialias") -> Tensor:
    """uint8 (B,3,c,c) -> float32 (B,3,S,S) in [-1,1].

    `resize` "antialias": a low-pass filter first. "nearest": as published, where every eighth row and column of 256 px
    is simply left out, which the discriminator can see (difference 5 of ratlip/published.py).
    """
    x = images.to(torch.float32)
    if images.shape[-1] != image_size:
        antialias = {"mode": "bilinear", "antialias": True, "align_corners": False}
        x = F.interpolate(x, size=image_size, **({"mode": "nearest"} if resize == "nearest" else antialias))
    return x / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Images (B,3,S,S) in [-1,1] (clamped here) -> uint8 (B,3,S,S), as they would be saved."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def real_images(split: Split, numbers: Iterable[int], crop: int, image_size: int) -> Tensor:
    """Centre crops of these images as networks and scores see them: float32 (N,3,S,S) in [-1,1]."""
    stack = np.stack([centre_crop(split.image(int(n)), crop).transpose(2, 0, 1) for n in numbers])
    return to_network(torch.from_numpy(stack), image_size)
