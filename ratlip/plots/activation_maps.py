"""Pictures of class activation maps (`ratlip.studies.grad_cam`), and their numbers against h."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Sequence

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor

from ratlip.plots.pictures import as_pixels, save

COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73"), "osD"


def overlays(rows: dict[str, tuple[Tensor, Tensor]], captions: Sequence[str], path: str | Path | None = None) -> Figure:
    """One row of pairs a name: the image, and beside it its map laid over the image in grey.

    `rows`: name -> images (C,3,S,S) in [-1,1] and maps (C,S,S) in [0,1]; `captions`: C strings.
    """
    count = len(captions)
    figure = Figure(figsize=(0.9 + 1.9 * count, 0.8 + 0.97 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    axes = figure.subplots(len(rows), 2 * count, squeeze=False)
    for line, (name, (images, maps)) in zip(axes, rows.items()):
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for i, (picture, values) in enumerate(zip(as_pixels(images), maps)):
            line[2 * i].imshow(picture, interpolation="nearest")
            line[2 * i + 1].imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=255)
            line[2 * i + 1].imshow(values.numpy(), cmap="magma", vmin=0, vmax=1, alpha=0.65)
    for i, words in enumerate(captions):
        axes[0, 2 * i].set_title(textwrap.fill(words, 28), fontsize=7, loc="left")
    figure.colorbar(ScalarMappable(cmap="magma"), ax=axes, shrink=0.5, pad=0.01, label="map")
    return save(figure, path)


def leads(found: dict[str, pd.DataFrame], title: str = "", path: str | Path | None = None) -> Figure:
    """By how much a map beats each control: method -> table of `explain.margins`; bars: two s.e."""
    figure = Figure(figsize=(6.4, 2.9), layout="constrained")
    ax = figure.subplots()
    for i, ((name, table), colour, marker) in enumerate(zip(found.items(), COLOURS, MARKERS)):
        place = np.arange(len(table)) + (i - (len(found) - 1) / 2) * 0.25
        ax.errorbar(table["margin"], place, xerr=2 * table["se"], fmt=marker, color=colour, capsize=3, label=name)
    ax.axvline(0, color="#000000", linewidth=1)
    ax.set_yticks(range(len(table)), [f"map - {control}" for control in table.index])
    ax.invert_yaxis()
    ax.set_xlabel("share of the map's energy on the object, difference")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=10)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=len(found))
    return save(figure, path)


def scores_against_h(
    frame: pd.DataFrame, columns: dict[str, str], real: dict[str, dict[str, float]], path: str | Path | None = None
) -> Figure:
    """One panel a column: a dot a run, a line through the means over seeds, a colour a method.

    `frame`: from `explain.sweep`; `columns`: those shown -> their titles; `real`: method -> the same scores
    of real images, dashed.
    """
    sizes = sorted(frame["hidden_size"].unique())
    figure = Figure(figsize=(2.9 * len(columns), 3.2), layout="constrained")
    for ax, (column, title) in zip(np.atleast_1d(figure.subplots(1, len(columns))), columns.items()):
        for (name, part), colour, marker in zip(frame.groupby("method", sort=False), COLOURS, MARKERS):
            place = [sizes.index(h) for h in part["hidden_size"]]
            mean = part.groupby("hidden_size")[column].mean()
            ax.plot(place, part[column], marker, color=colour, markersize=4, alpha=0.6)
            ax.plot(range(len(sizes)), mean.reindex(sizes), color=colour, label=name)
            if name in real:
                ax.axhline(real[name][column], color=colour, linestyle="--", linewidth=1)
        ax.set_xticks(range(len(sizes)), [str(h) for h in sizes])
        ax.set_xlim(-0.4, len(sizes) - 0.6)
        ax.set_xlabel("hidden size h")
        ax.set_title(title, fontsize=9)
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    handles, names = ax.get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        fontsize=8,
        frameon=False,
        loc="outside lower center",
        ncols=len(names),
        title="dots: runs; lines: means over seeds; dashed: real images",
        title_fontsize=8,
    )
    return save(figure, path)
