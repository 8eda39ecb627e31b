"""The judge's gate: is there an object with a shape at all?

A classifier that has seen nothing but objects names one in every picture: shapeless ones got 85 % for size and
position. So a second small CNN is trained to tell real training images (some with a little noise or blur, as generated
ones have it) from pictures made of them that show no object (`CONTROLS`). Two further kinds (`UNSEEN`) are kept out of
training: how many of those pass says what the gate does with pictures that nobody thought of.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.progress import bar

VERSION, STEPS, BATCH = 1, 300, 64
SOFT, SHAPELESS = 0.02, (0.1, 0.3)  # standard deviations of a blur, in image widths: an image still, or none any more


def blurred(images: Tensor, sigmas: np.ndarray) -> Tensor:
    """Each of images (N,3,S,S) blurred by its own Gaussian, `sigmas` (N,) in image widths; the border is repeated."""
    size = images.shape[-1]
    away = torch.arange(size) - torch.arange(size)[:, None]
    kernel = torch.exp(-(away.square() / 2) / (torch.from_numpy(sigmas).float() * size).square().view(-1, 1, 1))
    kernel = (kernel / kernel.sum(2, keepdim=True))[:, None]
    return kernel @ images @ kernel.transpose(2, 3)


def _blur(images: Tensor, rng: np.random.Generator) -> Tensor:
    return blurred(images, rng.uniform(*SHAPELESS, len(images)))


def _shuffle(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Patches of an eighth or a quarter of the width in random order; each image in its own."""
    count, _, size, _ = images.shape
    side = max(2, size // int(rng.choice([4, 8])))
    whole = size // side * side
    patches = F.unfold(images[..., :whole, :whole], side, stride=side)
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(patches.shape[2]), (count, 1)), axis=1))
    moved = F.fold(patches.gather(2, order[:, None].expand_as(patches)), whole, side, stride=side)
    return F.interpolate(moved, size=size)


def _background(images: Tensor, rng: np.random.Generator) -> Tensor:
    """The mean colour of the corners, with a gradient and a little noise."""
    count, _, size, _ = images.shape
    corners = images[..., [0, 0, -1, -1], [0, -1, 0, -1]].median(dim=2).values[..., None, None]
    slope = torch.from_numpy(rng.normal(0, 0.1, (2, count, 1, 1, 1))).float()
    axis = torch.linspace(-1, 1, size)
    return corners + slope[0] * axis + slope[1] * axis[:, None]


def _clouds(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Smooth random colours, coarse or fine, around the image's mean colour."""
    grid = int(rng.integers(2, 1 + images.shape[-1] // 2))
    noise = torch.from_numpy(rng.normal(0, rng.uniform(0.2, 0.8), (len(images), 3, grid, grid))).float()
    smooth = F.interpolate(noise, size=images.shape[-1], mode="bicubic", align_corners=False)
    return images.mean((2, 3), keepdim=True) + smooth


def _phases(images: Tensor, rng: np.random.Generator) -> Tensor:
    """The same spectrum with the phases of white noise, common to the colours: textures without an object."""
    size = images.shape[-1]
    noise = torch.fft.rfft2(torch.from_numpy(rng.normal(size=(len(images), 1, size, size))).float())
    noise[..., 0, 0] = 1
    spectrum = torch.fft.rfft2(images)
    turned = torch.fft.irfft2(spectrum.abs() * torch.exp(1j * noise.angle()), s=(size, size))
    return turned - turned.mean((2, 3), keepdim=True) + images.mean((2, 3), keepdim=True)


def _mean(images: Tensor, rng: np.random.Generator) -> Tensor:
    """The mean of eight images."""
    return images[torch.from_numpy(rng.integers(0, len(images), (len(images), 8)))].mean(1)


Control = Callable[[Tensor, np.random.Generator], Tensor]
CONTROLS: dict[str, Control] = dict(blurred=_blur, shuffled=_shuffle, background=_background, clouds=_clouds)
UNSEEN: dict[str, Control] = {"random phases": _phases, "mean of eight": _mean}


def fit(gate: nn.Module, images: Tensor, seed: int, progress: bool = True) -> None:
    """Train a gate (one head "object": absent, present) on training images (N,3,S,S) and pictures made of them."""
    rng = np.random.default_rng([seed, 32])
    optimizer = torch.optim.AdamW(gate.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    target = (torch.arange(BATCH) < BATCH // 2).long()
    gate.train()
    for _ in bar(range(STEPS), desc="gate of the judge", enabled=progress):
        real, *others = (images[rng.integers(0, len(images), n)] for n in (BATCH // 2, *[BATCH // 8] * len(CONTROLS)))
        soft = np.where(rng.random(len(real)) < 0.5, rng.uniform(1e-3, SOFT, len(real)), 1e-3)
        made = [make(part, rng) for make, part in zip(CONTROLS.values(), others, strict=True)]
        x = torch.cat([blurred(real, soft), *made])
        x = x + torch.from_numpy(rng.uniform(0, 0.1, (BATCH, 1, 1, 1)) * rng.normal(size=x.shape)).float()
        loss = F.cross_entropy(gate(x.clamp(-1, 1))["object"], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    gate.eval()


@torch.no_grad()
def shares_passed(gate: nn.Module, images: Tensor, seed: int = 0) -> dict[str, float]:
    """In what share of images (N,3,S,S) of each kind the gate finds an object: "real", and pictures made of them."""
    rng = np.random.default_rng([seed, 33])
    kinds = {"real": images} | {name: make(images, rng) for name, make in (CONTROLS | UNSEEN).items()}
    found = {name: torch.cat([gate(p.clamp(-1, 1))["object"] for p in each.split(256)]) for name, each in kinds.items()}
    return {name: round(float((logits.argmax(1) == 1).float().mean()), 4) for name, logits in found.items()}
