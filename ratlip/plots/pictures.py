"""Figures of images in [-1,1]: rows of pictures, grids by caption, samples of models, maps laid over images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ratlip.data.batches import to_bytes
from ratlip.files import atomic_path
from ratlip.plots import style

TEXT: dict[str, Any] = {"parse_math": False}  # captions are words: a "$" in one is a dollar


def as_pixels(images: Tensor) -> np.ndarray:
    """Images (...,3,H,W) in [-1,1] (clamped here) -> uint8 (...,H,W,3)."""
    return to_bytes(images.detach().float()).movedim(-3, -1).cpu().numpy()


def save_images(images: Tensor, folder: str | Path, names: Sequence[str]) -> list[Path]:
    """Save images (N,3,H,W) in [-1,1] as PNG files `<name>.png` in `folder`, one each."""
    paths = [Path(folder) / f"{name}.png" for name in names]
    for pixels, path in zip(as_pixels(images), paths, strict=True):
        with atomic_path(path) as draft:
            Image.fromarray(pixels).save(draft)
    return paths


def pictures(images: Sequence[Tensor], titles: Sequence[str] = (), columns: int = 8, width: float = 1.35) -> Figure:
    """Images (3,H,W) in [-1,1], of any sizes, each in a frame of its own with its title above, row by row."""
    rows = -(-len(images) // columns)
    lines = max((title.count("\n") + 1 for title in titles if title), default=0)
    figure = Figure(figsize=(width * columns, (width + 0.17 * lines) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, ax in enumerate(axes):
        ax.set_axis_off()
        if i < len(images):
            ax.imshow(as_pixels(images[i]), interpolation="nearest")
            ax.set_title(titles[i] if i < len(titles) else "", fontsize=8, pad=3, **TEXT)
    return figure


def caption_grid(
    images: Tensor,
    captions: Sequence[str],
    path: str | Path | None = None,
    title: str = "",
    real: Tensor | None = None,
    names: Sequence[str] = (),
) -> Figure:
    """One row a caption: the words on the left, generated images beside them, a real one last where given.

    `images` (R,C,3,H,W) in [-1,1]; `captions`: R strings; `real` (R,3,H,W) in [-1,1]; `names`: of the C columns, such
    as models. Saved to `path` where given (png, pdf, svg, jpg).
    """
    rows, columns = images.shape[:2]
    shown = columns + (real is not None)
    figure = Figure(figsize=(2.6 + shown, 0.35 + rows), layout="constrained")
    axes = figure.subplots(rows, shown + 1, squeeze=False, width_ratios=[2.6, *[1] * shown])
    for ax in axes.flat:
        ax.set_axis_off()
    for row, (line, words) in enumerate(zip(axes, captions, strict=True)):
        place = dict(ha="right", va="center", fontsize=9, transform=line[0].transAxes)
        line[0].text(1, 0.5, textwrap.fill(words, 30), **place, **TEXT)
        for ax, picture in zip(line[1:], [*images[row], *([] if real is None else [real[row]])], strict=True):
            ax.imshow(as_pixels(picture), interpolation="nearest")
    for ax, name in zip(axes[0, 1:], names, strict=False):
        ax.set_title(textwrap.fill(name, 14), fontsize=8, **TEXT)
    if real is not None:
        axes[0, -1].set_title("real", fontsize=9)
        if not names:
            axes[0, 1].set_title("generated", fontsize=9, loc="left")
    if title:
        figure.suptitle(title, fontsize=10)
    if path is not None:
        style.write(figure, path)
    return figure


def overlays(rows: dict[str, tuple[Tensor, Tensor]], captions: Sequence[str]) -> Figure:
    """One row of pairs a name: the image, and beside it its class activation map laid over the image in grey.

    `rows`: name -> images (C,3,S,S) in [-1,1] and maps (C,S,S) in [0,1]; `captions`: C strings.
    """
    count = len(captions)
    figure = Figure(figsize=(0.9 + 1.9 * count, 0.8 + 0.97 * len(rows)))
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    axes = figure.subplots(len(rows), 2 * count, squeeze=False)
    for line, (name, (images, maps)) in zip(axes, rows.items(), strict=True):
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for left, right, picture, values in zip(line[::2], line[1::2], as_pixels(images), maps, strict=True):
            left.imshow(picture, interpolation="nearest")
            right.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=255)
            right.imshow(values.numpy(), cmap="magma", vmin=0, vmax=1, alpha=0.65)
    for ax, words in zip(axes[0, ::2], captions, strict=True):
        ax.set_title(textwrap.fill(words, 28), fontsize=7, loc="left", **TEXT)
    figure.colorbar(ScalarMappable(cmap="magma"), ax=axes, shrink=0.5, pad=0.01, label="map")
    return figure


def stages(paths: Sequence[Path]) -> Figure:
    """Saved pictures of one size (such as a run's sample grids) side by side."""
    sheets = [np.asarray(Image.open(each).convert("RGB")) for each in paths]
    height, width, _ = sheets[0].shape
    figure = Figure(figsize=(3.5 * len(sheets), 3.5 * height / width), layout="constrained")
    for ax, sheet in zip(figure.subplots(1, len(sheets), squeeze=False)[0], sheets, strict=True):
        ax.imshow(sheet)
        ax.set_axis_off()
    return figure
