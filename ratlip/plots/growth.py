"""How time and memory of a training step grow, on log axes, with the fitted power and where it leads."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ratlip.plots.style import COLOURS, GREY

NAMES = {"batch": "images a step", "image_size": "side of the image (px)", "hidden_size": "h of the LSTM"}
ROWS = {"time": "seconds a step", "memory": "peak memory (GiB)"}


def growth_figure(summary: dict[str, Any]) -> Figure:
    """A column for each of what is varied, a row for time and one for memory.

    `summary`: that of the section `growth` of `studies.performance`. Dots: measured (median and range). Line: the
    fitted power, of memory with what the process holds before the step; it goes on, dotted, where memory is
    extrapolated to the largest of the dashed limits.
    """
    figure = Figure(figsize=(3.2 * len(summary), 5.4), layout="constrained")
    axes = figure.subplots(len(ROWS), len(summary), squeeze=False)
    for column, (varied, found) in enumerate(summary.items()):
        rows = [row for row in found["rows"] if "failed" not in row]
        x = np.array([row["value"] for row in rows], dtype=float)
        for ax, (kind, name) in zip(axes[:, column], ROWS.items(), strict=True):
            fit = found[kind]
            held = found["held_mib"] / 1024 if kind == "memory" else 0.0
            scale = 1024.0 if kind == "memory" else 1.0
            inside = np.geomspace(x[0], x[-1], 50)
            ax.plot(inside, held + fit["factor"] * inside ** fit["exponent"] / scale, color=COLOURS[0])
            if kind == "time":
                y, low, high = (np.array([row["seconds"][key] for row in rows]) for key in ("median", "low", "high"))
                ax.errorbar(x, y, (y - low, high - y), fmt="o", color=COLOURS[0], capsize=2)
            else:
                ax.plot(x, [row["peak_mib"] / scale for row in rows], "o", color=COLOURS[0])
                _limits(ax, found, x, held)
            ax.set(xscale="log", yscale="log", xlabel=NAMES[varied], ylabel=name)
            ax.set_title(f"grows with power {fit['exponent']:.2f} ± {fit['error']:.2f}")
            ax.set_xticks(x, [f"{value:g}" for value in x])
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def _limits(ax: Any, found: dict[str, Any], x: np.ndarray, held: float) -> None:
    """Lines at the limits that the fit reaches within six doublings, and the fit up to there."""
    fit = found["memory"]
    ahead = np.geomspace(x[-1], 64 * x[-1], 200)
    need = held + fit["factor"] * ahead ** fit["exponent"] / 1024
    reached = [float(limit) for limit in found["largest"] if need[-1] >= float(limit)]
    for limit in reached:
        ax.axhline(limit, color=GREY, linestyle="--", linewidth=1)
        ax.text(x[0], limit, f"{limit:g} GiB", fontsize=7, va="bottom", color=GREY)
    if reached:
        within = need <= 1.1 * max(reached)
        ax.plot(ahead[within], need[within], color=COLOURS[0], linestyle=":")
