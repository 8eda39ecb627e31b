"""Charts of many runs: scores by variant, scores against h. One dot a seed: noise must not pass for news."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ratlip.plots.pictures import as_pixels, save

# Okabe and Ito's colours, which most colour-blind readers can tell apart; markers do it in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":", "-.")


def _wrapped(title: str, width: int = 28) -> str:
    return "\n".join(textwrap.fill(line, width) for line in title.splitlines())


def by_variant(
    frame: pd.DataFrame,
    columns: dict[str, str],
    real: dict[str, float] | None = None,
    title: str = "",
    path: str | Path | None = None,
) -> Figure:
    """One panel a score, one line a variant: a dot a seed, a bar at the mean, real images' value dashed.

    `frame`: as of `experiments.results`; `columns`: {score: title of its panel}; `real`: {score: value}.
    """
    labels = list(dict.fromkeys(frame["label"]))
    figure = Figure(figsize=(1.9 + 2.3 * len(columns), 0.9 + 0.34 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, (column, name) in zip(axes, columns.items()):
        for row, label in enumerate(labels):
            values = frame.loc[frame["label"] == label, column].to_numpy(dtype=float)
            colour, marker = COLOURS[row % len(COLOURS)], MARKERS[row % len(MARKERS)]
            ax.plot(
                values, np.full(len(values), row), marker, color=colour, markersize=5, alpha=0.75, markeredgewidth=0
            )
            ax.plot([values.mean()] * 2, [row - 0.32, row + 0.32], color=colour, linewidth=2)
        if real and column in real:
            ax.axvline(real[column], color="#555555", linestyle="--", linewidth=1)
            ax.text(real[column], -0.62, "real", fontsize=7, ha="center", va="bottom", color="#555555")
        ax.set_title(_wrapped(name), fontsize=9, pad=12 if real else 6)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=9)
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    if title:
        figure.suptitle(title, fontsize=10)
    return save(figure, path)


def against(
    frame: pd.DataFrame,
    x: str,
    columns: dict[str, str],
    real: dict[str, float] | None = None,
    label: str = "",
    path: str | Path | None = None,
) -> Figure:
    """One panel a score against `x`, whose values have equal room: a dot a seed, the mean as a line."""
    places = {value: i for i, value in enumerate(sorted(frame[x].unique()))}
    rows = -(-len(columns) // 3)
    figure = Figure(figsize=(3.1 * min(3, len(columns)) + 0.3, 2.3 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, min(3, len(columns)), squeeze=False).ravel()
    for ax, (column, name) in zip(axes, columns.items()):
        means = frame.groupby(x)[column].mean()
        ax.plot([places[value] for value in means.index], means.to_numpy(), color=COLOURS[0], linewidth=1.5)
        ax.plot(
            [places[value] for value in frame[x]],
            frame[column].to_numpy(dtype=float),
            "o",
            color=COLOURS[1],
            markersize=4.5,
            alpha=0.8,
            markeredgewidth=0,
        )
        if real and column in real:
            ax.axhline(real[column], color="#555555", linestyle="--", linewidth=1, label="real images")
            ax.legend(fontsize=7, frameon=False)
        ax.set_xticks(list(places.values()), list(places))
        ax.set_title(_wrapped(name), fontsize=9)
        ax.set_xlabel(label or x, fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(columns) :]:
        ax.set_axis_off()
    return save(figure, path)


def intervals(
    differences: dict[str, object], title: str = "", xlabel: str = "", path: str | Path | None = None
) -> Figure:
    """Mean differences with 95 % intervals (`experiments.Difference`), zero marked; wide ones are cut."""
    names = list(differences)
    figure = Figure(figsize=(6.4, 0.8 + 0.36 * len(names)), layout="constrained")
    ax = figure.subplots()
    reach = 3 * max((abs(each.mean) for each in differences.values()), default=1) or 1
    for row, (name, each) in enumerate(differences.items()):
        colour = {"supported": COLOURS[0], "contradicted": COLOURS[1]}.get(each.verdict, "#777777")
        low, high = max(each.low, -reach), min(each.high, reach)
        ax.plot([low, high], [row, row], color=colour, linewidth=2, linestyle="-" if each.n > 2 else "--")
        ax.plot(each.mean, row, "o", color=colour, markersize=6)
        ax.annotate(f" {each.verdict}", (1, row), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlim(-1.05 * reach, 1.05 * reach)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.set_xlabel(xlabel, fontsize=8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=10)
    return save(figure, path)


def samples(images: Sequence, captions: Sequence[str], models: Sequence[str], path: str | Path | None = None) -> Figure:
    """Images (captions, models, 3, H, W) in [-1,1]: one row a caption, one column a model."""
    figure = Figure(figsize=(2.3 + 1.1 * len(models), 0.55 + 1.1 * len(captions)), layout="constrained")
    axes = figure.subplots(
        len(captions), len(models) + 1, squeeze=False, width_ratios=[2.1, *itertools.repeat(1, len(models))]
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for line, words, row in zip(axes, captions, images):
        line[0].text(1, 0.5, textwrap.fill(words, 26), ha="right", va="center", fontsize=8, transform=line[0].transAxes)
        for ax, picture in zip(line[1:], row):
            ax.imshow(as_pixels(picture), interpolation="nearest")
    for ax, name in zip(axes[0, 1:], models):
        ax.set_title(textwrap.fill(name, 14), fontsize=8)
    return save(figure, path)
