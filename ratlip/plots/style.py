"""How every figure looks and where it is kept: one theme, one colour and one marker a variant, one `keep`.

Imports neither pyplot nor seaborn: the training loop, which draws its sample grids, must not wait for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ratlip.files import atomic_path, repository

# Okabe and Ito's colours, which most colour-blind readers can tell apart: for what is no variant, in this order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1)))
GREY = "#6E6E6E"  # what is compared with: real images, a chance level, zero

# Hue says how the sentence reaches the generator; the darker shade of a hue has shuffle attention.
VARIANTS = {
    "CAT": ("#56B4E9", "o"),
    "CAT + SA": ("#0072B2", "s"),
    "RAT": ("#E69F00", "D"),
    "RAT + SA": ("#D55E00", "^"),
    "RAT in the mapper + SA": ("#CC79A7", "v"),
    "RAT scaled + SA": ("#AA3377", "v"),
    "RAT scaled + norm": ("#8C564B", "p"),
    "published RAT": ("#5FD3B0", "P"),
    "published RAT + SA": ("#007A5A", "X"),
    "corrected": ("#332288", "o"),
    "published": ("#999933", "s"),
    "published normalisation": ("#882255", "D"),
    "main run": ("#000000", "*"),
    "real images": (GREY, "d"),
}
FREE = ("#AA4499", "#117733", "#CC6677", "#6699CC", "#661100", "#DDCC77")
_others: dict[str, int] = {}  # labels that stand nowhere above, in the order in which they came

# What charts.py gives to seaborn.set_theme. A font that comes with matplotlib: the same figure on every machine.
SIZES = {"axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8}
FRAME = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "legend.frameon": False}
RC = {**SIZES, **FRAME, "grid.alpha": 0.35, "text.color": "black"}  # black: as in sample grids made without seaborn
THEME = {"context": "paper", "style": "ticks", "palette": COLOURS, "font": "DejaVu Sans", "rc": RC}


def look(label: str) -> dict[str, Any]:
    """{"color", "marker"} of a variant, the same on every figure.

    "h = N" goes from dark (0) to light with log h; a label that is not known gets the next free colour, and keeps it.
    """
    if label in VARIANTS:
        colour, marker = VARIANTS[label]
    elif size := re.fullmatch(r"h = (\d+)", label):
        h = int(size[1])
        share = min(math.log2(h + 1) / 7.8, 0.92)  # the lightest yellow is hard to see on white
        colour, marker = to_hex(matplotlib.colormaps["viridis"](share)), MARKERS[h.bit_length() % 7]
    else:
        number = _others.setdefault(label, len(_others))
        colour, marker = FREE[number % len(FREE)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker}


def palette(labels: Iterable[str]) -> dict[str, str]:
    """{label: colour}, as seaborn takes it."""
    return {label: look(label)["color"] for label in labels}


def panels_of(content: dict, width: float, height: float, columns: int = 3, **options) -> tuple[Figure, list[tuple]]:
    """A figure, and for each item of `content` a panel of a size in inches: (axes, key, value)."""
    rows, columns = -(-len(content) // columns), min(len(content), columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes[len(content) :]:
        ax.set_axis_off()
    return figure, [(axes[i], *item) for i, item in enumerate(content.items())]


def one_panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of a size in inches with one panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def write(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Save `figure`, whole or not at all, in the format of the suffix (png, pdf, svg, jpg).

    An SVG is the same file every time: without a date, its parts named by a fixed salt.
    """
    metadata = {"Date": None} if Path(path).suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "ratlip"}), atomic_path(Path(path)) as draft:
        figure.savefig(draft, dpi=dpi, bbox_inches="tight", metadata=metadata)


def keep(figure: Figure, report: str | Path | None, name: str) -> Figure:
    """Save <report>/figures/<name>.png for the page and .svg for print (nothing without a report); hand it on."""
    if report:
        for suffix in (".png", ".svg"):
            write(figure, repository() / report / "figures" / f"{name}{suffix}", dpi=200)
    return figure
