"""Figures. Each function returns a matplotlib Figure, and saves it where a path is given."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from ratlip.data.batches import to_bytes
from ratlip.files import atomic_path, repository


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Save `figure` to `path` (whole or not at all), if there is one, and hand it on.

    A PNG in a report's figures/ gets an SVG beside it, for print: the same file at each call, without a date and
    with names of its parts by a fixed salt.
    """
    if path is None:
        return figure
    path = Path(path)
    with atomic_path(path) as draft:
        figure.savefig(draft, dpi=150, bbox_inches="tight")
    if path.parent.name == "figures" and path.suffix == ".png":
        with matplotlib.rc_context({"svg.hashsalt": "ratlip"}), atomic_path(path.with_suffix(".svg")) as draft:
            figure.savefig(draft, bbox_inches="tight", metadata={"Date": None})
    return figure


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


def mosaic(images: Tensor, columns: int) -> np.ndarray:
    """Images (N,3,H,W) in [-1,1] side by side, a white line between them: uint8 (rows*(H+1)-1, ..., 3)."""
    pixels = as_pixels(images)
    n, h, w, _ = pixels.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + 1) - 1, columns * (w + 1) - 1, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        sheet[top : top + h, left : left + w] = picture
    return sheet


def caption_grid(
    images: Tensor, captions: Sequence[str], path: str | Path | None = None, title: str = "", real: Tensor | None = None
) -> Figure:
    """One row a caption: the words on the left, generated images beside them, a real one last where given.

    `images` (R,C,3,H,W) in [-1,1]; `captions`: R strings; `real` (R,3,H,W) in [-1,1].
    """
    rows, columns = images.shape[:2]
    shown = columns + (real is not None)
    figure = Figure(figsize=(2.6 + shown, 0.35 + rows), layout="constrained")
    axes = figure.subplots(rows, shown + 1, squeeze=False, width_ratios=[2.6, *[1] * shown])
    for ax in axes.flat:
        ax.set_axis_off()
    for row, (line, words) in enumerate(zip(axes, captions)):
        line[0].text(1, 0.5, textwrap.fill(words, 30), ha="right", va="center", fontsize=9, transform=line[0].transAxes)
        pictures = [*images[row], *([real[row]] if real is not None else [])]
        for ax, picture in zip(line[1:], pictures):
            ax.imshow(as_pixels(picture), interpolation="nearest")
    if real is not None:
        axes[0, 1].set_title("generated", fontsize=9, loc="left")
        axes[0, -1].set_title("real", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return save(figure, path)


def picture_sheet(images: Tensor, columns: int = 12, path: str | Path | None = None, title: str = "") -> Figure:
    """Images (N,3,H,W) in [-1,1] as one sheet."""
    sheet = mosaic(images, columns)
    width = columns * 0.75
    figure = Figure(figsize=(width, sheet.shape[0] / sheet.shape[1] * width + 0.3), layout="constrained")
    ax = figure.subplots()
    ax.imshow(sheet, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, fontsize=10)
    return save(figure, path)


def curves(
    rows: Sequence[dict], panels: dict[str, dict[str, str]], path: str | Path | None = None, x: str = "step"
) -> Figure:
    """Line charts of logged rows: `panels` maps a panel's title to {column: label}."""
    figure = Figure(figsize=(4 * len(panels), 2.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, columns) in zip(axes, panels.items()):
        for (column, label), style in zip(columns.items(), itertools.cycle(("-", "--", ":", "-."))):
            ax.plot(
                [row[x] for row in rows],
                [row[column] for row in rows],
                style,
                label=label,
                linewidth=1.5,
                marker="o" if len(rows) == 1 else None,
            )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(x)
        ax.grid(alpha=0.3)
        if len(columns) > 1:
            ax.legend(fontsize=8, frameon=False)
    return save(figure, path)


def bars(
    values: dict[str, float], chance: dict[str, float] | None = None, title: str = "", path: str | Path | None = None
) -> Figure:
    """Shares (0 to 1) as horizontal bars, with the chance level as a tick where given."""
    figure = Figure(figsize=(5.8, 0.5 + 0.42 * len(values)), layout="constrained")
    ax = figure.subplots()
    names = list(values)[::-1]
    ax.barh(names, [values[name] for name in names], color="#0072B2", height=0.6)
    for i, name in enumerate(names):
        crossed = chance and -0.01 < chance[name] - values[name] < 0.12  # the chance line would hide the number
        x = chance[name] if crossed else values[name]
        ax.text(x + 0.01, i, f"{values[name]:.0%}", va="center", fontsize=9)
        if chance:
            ax.plot(
                [chance[name]] * 2, [i - 0.4, i + 0.4], color="#D55E00", linewidth=2, label="chance" if i == 0 else None
            )
    ax.set_xlim(0, 1.12)
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    if chance:
        figure.legend(fontsize=8, frameon=False, loc="outside right lower")
    return save(figure, path)


def pictures(
    images: Sequence[Tensor],
    titles: Sequence[str] = (),
    columns: int = 8,
    width: float = 1.35,
    path: str | Path | None = None,
) -> Figure:
    """Images (3,H,W) in [-1,1], of any sizes, each in a frame of its own with its title above, row by row."""
    rows = -(-len(images) // columns)
    lines = max((title.count("\n") + 1 for title in titles if title), default=0)
    figure = Figure(figsize=(width * columns, (width + 0.17 * lines) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, picture, title in zip(axes, images, [*titles, *[""] * len(images)]):
        ax.imshow(as_pixels(picture), interpolation="nearest")
        ax.set_title(title, fontsize=8, pad=3)
    return save(figure, path)


def heatmap(
    values,
    rows: Sequence[str] = (),
    images: Sequence[Tensor] = (),
    title: str = "",
    side=0.5,
    label: str = "cosine",
    axes: str = "",
    path: str | Path | None = None,
) -> Figure:
    """A matrix (R,C) as colours, zero white; names of the rows at the left, images (3,H,W) of columns on top.

    `axes`: what both axes count, instead of names."""
    values = np.asarray(values, dtype=float)
    words = 0.065 * max(map(len, rows), default=0)
    size = (1.2 + words + side * values.shape[1], 0.7 + side * (values.shape[0] + bool(len(images))))
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    limit = np.abs(values).max()
    shown = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for column, picture in enumerate(images):
        place = (column - 0.46, column + 0.46, -0.6, -1.52)
        ax.imshow(as_pixels(picture), extent=place, interpolation="nearest")
    ax.set_xlim(-0.5, values.shape[1] - 0.5)
    ax.set_ylim(values.shape[0] - 0.5, -1.56 if len(images) else -0.5)
    ax.set_xlabel(axes)
    ax.set_ylabel(axes)
    if axes:  # counted from 1
        count = MaxNLocator(8, integer=True, min_n_ticks=3)
        for axis, length in ((ax.xaxis, values.shape[1]), (ax.yaxis, values.shape[0])):
            ticks = sorted({1, length, *(int(t) for t in count.tick_values(1, length) if 1 < t < length - 1)})
            axis.set_ticks([tick - 1 for tick in ticks], [str(tick) for tick in ticks], fontsize=8)
    else:
        ax.set_xticks([])
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=10)
    figure.colorbar(shown, ax=ax, shrink=0.7, label=label)
    return save(figure, path)


def grouped_bars(
    groups: dict[str, dict[str, float]],
    chance: dict[str, float] | None = None,
    errors: dict[str, dict[str, float]] | None = None,
    title: str = "",
    path: str | Path | None = None,
) -> Figure:
    """Shares (0 to 1), `groups[who][what]`, side by side, with error bars and chance levels where given."""
    names, colours = list(next(iter(groups.values()))), ("#0072B2", "#BBBBBB", "#009E73")
    figure = Figure(figsize=(1.5 + 1.2 * len(names), 3.1), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(groups)
    for i, ((who, shares), colour) in enumerate(zip(groups.items(), colours)):
        x = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * width
        spread = [errors[who][name] for name in names] if errors and who in errors else None
        ax.bar(
            x,
            [shares[name] for name in names],
            width * 0.94,
            yerr=spread,
            label=who,
            color=colour,
            error_kw={"elinewidth": 1, "capsize": 3},
        )
    for i, name in enumerate(names if chance else ()):
        ax.plot(
            [i - 0.45, i + 0.45], [chance[name]] * 2, color="#D55E00", linewidth=2, label="chance" if i == 0 else None
        )
    ax.set_xticks(range(len(names)), names)
    ax.set_ylim(0, 1.05)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=10)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    return save(figure, path)


def stages(paths: Sequence[Path], path: str | Path | None = None) -> Figure:
    """Saved pictures of one size (such as a run's sample grids) side by side."""
    sheets = [np.asarray(Image.open(each).convert("RGB")) for each in paths]
    height, width, _ = sheets[0].shape
    figure = Figure(figsize=(3.5 * len(sheets), 3.5 * height / width), layout="constrained")
    for ax, sheet in zip(np.atleast_1d(figure.subplots(1, len(sheets))), sheets, strict=True):
        ax.imshow(sheet)
        ax.set_axis_off()
    return save(figure, path)


def histograms(panels: dict[str, Sequence[float]], path: str | Path | None = None) -> Figure:
    """One histogram a panel: {title: values}."""
    figure = Figure(figsize=(3.4 * len(panels), 2.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        ax.hist(values, bins=min(30, len(np.unique(values)) + 1), color="#0072B2")
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def figure_path(report: str | Path | None, name: str) -> Path | None:
    """Where a figure is saved: <repository>/<report>/figures/<name>; nowhere (None) without a report."""
    return repository() / report / "figures" / name if report else None
