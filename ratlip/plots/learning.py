"""Charts of the study: how a score grows with training steps, and paired differences over seeds."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from ratlip.plots import style
from ratlip.plots.style import COLOURS, GREY, LINES, one_panel, panels_of


def learning_curves(visits: pd.DataFrame, column: str, name: str) -> Figure:
    """A score (0 to 1, drawn in percent) against steps on a log axis: seeds thin, their mean thick.

    `visits`: one row a visit (label, seed, step, `column`).
    """
    figure, ax = one_panel(6.4, 3.8)
    labels = list(dict.fromkeys(visits["label"]))
    for i, label in enumerate(labels):
        rows = visits[visits["label"] == label].assign(share=lambda each: 100 * each[column])
        look = {**style.look(label), "linestyle": LINES[i % 4]}
        for _, own in rows.groupby("seed"):
            ax.plot(own["step"], own["share"], **{**look, "marker": None}, linewidth=0.5, alpha=0.4)
        mean = rows.groupby("step")["share"].mean()
        ax.plot(mean.index, mean, **look, linewidth=1.8, markersize=5, label=f"{label} (n = {rows['seed'].nunique()})")
    ax.set_xscale("log")
    steps = sorted(set(visits["step"]))
    ax.set_xticks(steps, [f"{step:,}" for step in steps])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="training step", ylabel=name, ylim=(0, None))
    ax.legend(loc="lower right")
    return figure


def seed_differences(found: dict[str, pd.Series], xlabel: str) -> Figure:
    """Paired differences, a line a question: a dot a seed, a bar at the mean; zero is dashed."""
    figure, ax = one_panel(6.4, 0.9 + 0.55 * len(found))
    for row, d in enumerate(found.values()):
        shift = 0.3 * (np.arange(len(d)) / max(1, len(d) - 1) - 0.5)
        ax.scatter(d, row + shift, s=22, color=COLOURS[0], alpha=0.8, linewidth=0)
        ax.vlines(d.mean(), row - 0.3, row + 0.3, color="#222222", linewidth=1.6)
    ax.axvline(0, color=GREY, linestyle="--", linewidth=1)
    ax.set_yticks(range(len(found)), [textwrap.fill(name, 28) for name in found])
    ax.set(xlabel=xlabel, ylim=(len(found) - 0.5, -0.5), ylabel="a - b")
    return figure


def by_depth(panels: dict[str, pd.DataFrame], names: dict[str, tuple[str, str]], chance: dict[str, float]) -> Figure:
    """A number against the depth of a generator, one panel each: each variant's mean over seeds, its range as a band.

    `panels`: title -> columns label, seed, layer, value; `names`: title -> (label of x, of y); `chance`: dashed.
    """
    figure, axes = panels_of(panels, 4.6, 3.2, 2)
    for ax, title, frame in axes:
        for i, (label, rows) in enumerate(frame.groupby("label", sort=False)):
            each = rows.groupby("layer")["value"].agg(["mean", "min", "max"])
            look = {**style.look(str(label)), "linestyle": LINES[i % 4]}
            ax.plot(each.index, each["mean"], **look, linewidth=1.6, markersize=4, label=label)
            ax.fill_between(each.index, each["min"], each["max"], color=look["color"], alpha=0.12, linewidth=0)
        if title in chance:
            ax.axhline(chance[title], color=GREY, linestyle="--", linewidth=1, label="largest class")
        ax.set(xlabel=names[title][0], ylabel=names[title][1], title=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].legend()
    return figure
