"""Statistical charts: scores, curves, differences, distances, costs. One dot a seed: noise must not pass for news."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from ratlip.plots import style
from ratlip.plots.pictures import as_pixels
from ratlip.plots.style import COLOURS, GREY, LINES, MARKERS, one_panel, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ratlip.studies.compare import Difference
    from ratlip.studies.neighbours import Neighbours

Shares = dict[str, float]  # attribute -> 0 to 1
sns.set_theme(**style.THEME)
MULTIPLES = (0.1, 0.25, 0.5, 1, 2, 4, 10)  # ticks of `study_chart`


def _wrap(words: str) -> str:
    return "\n".join(textwrap.fill(line, 28) for line in words.splitlines())


def _legend(figure: Figure, looks: dict[str, dict]) -> None:
    """Below the panels: {name: colour, marker and line style, as Line2D takes them}."""
    handles = [Line2D([], [], label=name, markersize=5, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handlelength=3)


def by_variant(
    frame: pd.DataFrame, columns: dict[str, str], real: dict[str, float] | None = None, reference: str = "real"
) -> Figure:
    """One panel a score, one line a variant: a dot a seed, a bar at the mean, real images' value dashed.

    `frame`: a row a run with a column `label`, as of `grid.results`; `columns`: {score: its name}; `real`: {score:
    value}, called `reference`. Where a variant has more than 12 dots, they are spread over the height of its line.
    """
    label, size = frame["label"], len(columns)
    labels = list(label.unique())
    figure, panels = panels_of(columns, 2.3 + 1.9 / size, 1.2 + 0.34 * len(labels), size, sharey=True)
    spread = 0.5 * (frame.groupby("label").cumcount() * 0.618 % 1 - 0.5)  # golden ratio: evenly filled
    dots = {"y": label.map(labels.index) + spread * (label.value_counts().max() > 12), "hue": label, "style": label}
    dots |= {"palette": style.palette(labels), "markers": {name: style.look(name)["marker"] for name in labels}}
    for ax, column, name in panels:
        sns.scatterplot(x=frame[column], **dots, s=32, alpha=0.8, linewidth=0, legend=False, ax=ax)
        means, rows = frame.groupby("label", sort=False)[column].mean(), np.arange(len(labels))
        ax.vlines(means, rows - 0.34, rows + 0.34, color="#222222", linewidth=1.6)
        if real and column in real:
            ax.axvline(real[column], color=GREY, linestyle="--", linewidth=1)
            ax.text(real[column], -0.62, reference, fontsize=7, ha="center", va="bottom", color=GREY)
        ax.set(xlabel=_wrap(name), ylabel="variant", ylim=(len(labels) - 0.5, -0.6))
        ax.set_yticks(rows, labels)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def spread_figure(values: dict[str, Sequence[float]], label: str, reference: dict[str, float]) -> Figure:
    """One line a variant: each value a dot, the mean a bar, the one `reference` dashed; the axis begins at 0."""
    frame = pd.DataFrame([{"label": name, label: float(v)} for name, each in values.items() for v in each])
    [(name, value)] = reference.items()
    figure = by_variant(frame, {label: label}, {label: value}, name)
    figure.set_size_inches(6.4, 1.2 + 0.5 * len(values))
    figure.axes[0].set(xlabel=label, xlim=(min(0, figure.axes[0].get_xlim()[0]), None))
    return figure


def against(
    frame: pd.DataFrame, x: str, columns: dict[str, str], real: dict | None = None, label: str = "", hue: str = ""
) -> Figure:
    """One panel a score against `x`, whose values have equal room: a dot a seed, the mean as a line.

    `columns`: {score: its name}; `real`: {score: value of real images}, dashed; `label`: of the x axis. `hue`: a column
    that splits the runs into lines of their own; `real` is then {its value: {score: value}}.
    """
    figure, panels = panels_of(columns, 3.1, 2.6, 2 if len(columns) == 4 else 3)
    lines = frame[hue] if hue else pd.Series("mean over seeds", frame.index)
    colours = style.palette(lines.unique()) if hue else {lines.iloc[0]: COLOURS[0]}
    sizes = sorted(frame[x].unique())
    by_size = {str(h): style.look(f"h = {h}")["color"] for h in sizes}
    dots = {"hue": hue, "palette": colours} if hue else {"hue": x, "palette": by_size}
    references = real or {} if hue else {"real images": real or {}}
    for ax, column, name in panels:
        common = {"x": x, "y": column, "legend": False, "ax": ax}
        line = {"order": sizes, "hue": "line", "palette": colours, "markers": "", "linewidth": 1.5, "errorbar": None}
        sns.pointplot(frame.assign(line=lines), **common, **line)
        sns.scatterplot(frame.assign(**{x: frame[x].map(str)}), s=28, linewidth=0, alpha=0.85, **common, **dots)
        for which, values in references.items():
            if column in values:
                ax.axhline(values[column], color=colours.get(which, GREY), linestyle="--", linewidth=1)
        ax.set(xlim=(-0.4, len(sizes) - 0.6), xlabel=label or x, ylabel=_wrap(name))
        ax.set_ylim(bottom=0 if hue else None)
    looks = {name: {"color": colour} for name, colour in colours.items()}
    looks["run"] = {"color": "#444444", "marker": "o", "linestyle": ""}
    _legend(figure, looks | ({"real images": {"color": GREY, "linestyle": "--"}} if real else {}))
    return figure


def intervals(differences: dict[str, Difference], title: str = "", xlabel: str = "mean difference") -> Figure:
    """Mean differences with 95 % intervals, zero marked, a line a claim; wide intervals are cut."""
    figure, ax = one_panel(6.4, 1.0 + 0.36 * len(differences))
    reach = 3 * max((abs(each.mean) for each in differences.values()), default=1) or 1
    for row, each in enumerate(differences.values()):
        colour = {"supported": COLOURS[0], "contradicted": COLOURS[1]}.get(each.verdict, GREY)
        ends = [max(each.low, -reach), min(each.high, reach)]
        ax.plot(ends, [row, row], color=colour, linewidth=2, linestyle="-" if each.n > 2 else "--")
        ax.plot(each.mean, row, "o", color=colour, markersize=6)
        ax.text(1.02, row, each.verdict, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.set(xlim=(-1.05 * reach, 1.05 * reach), xlabel=xlabel, ylabel="claim", title=title)
    ax.set_yticks(range(len(differences)), list(differences))
    ax.set_ylim(len(differences) - 0.5, -0.5)
    return figure


def leads(found: dict[str, pd.DataFrame], title: str = "") -> Figure:
    """By how much a map beats each control: method -> table of `grad_cam.margins`; bars: two standard errors."""
    figure, ax = one_panel(6.4, 2.9)
    looks: dict[str, dict[str, Any]] = {name: {**style.look(name), "linestyle": ""} for name in found}
    for i, (name, table) in enumerate(found.items()):
        line = np.arange(len(table)) + (i - (len(found) - 1) / 2) * 0.25
        ax.errorbar(table["margin"], line, xerr=2 * table["se"], capsize=3, markersize=5, **looks[name])
        ax.set_yticks(range(len(table)), [f"map - {control}" for control in table.index])
    ax.axvline(0, color="black", linewidth=0.8)
    ax.invert_yaxis()
    ax.set(xlabel="share of the map's energy on the object, difference", ylabel="map against control", title=title)
    _legend(figure, looks)
    return figure


def shares(
    groups: dict[str, Shares], chance: Shares | None = None, errors: dict[str, Shares] | None = None, title: str = ""
) -> Figure:
    """Bars of shares (0 to 1) of images, `groups[who][attribute]`; one group alone has its numbers beside its bars."""
    names, alone = list(next(iter(groups.values()))), len(groups) == 1
    figure, ax = one_panel(5.8, 1.0 + 0.42 * len(names) * (1 if alone else 0.6 * len(groups)))
    rows = pd.DataFrame(groups).loc[names].rename_axis("name").reset_index().melt("name")
    look = {"palette": [COLOURS[0], "#BBBBBB", COLOURS[2]][: len(groups)], "saturation": 1, "legend": not alone}
    sns.barplot(rows, x="value", y="name", hue="variable", errorbar=None, ax=ax, **look)
    for bars, who in zip(ax.containers, groups, strict=False):  # seaborn keeps the legend's bars there as well
        for bar, name in zip(bars, names, strict=True):
            middle, share = bar.get_y() + bar.get_height() / 2, groups[who][name]
            if errors and who in errors:
                ax.errorbar(share, middle, xerr=errors[who][name], color="black", linewidth=1, capsize=3)
            if alone:
                level = (chance or {}).get(name, 0)  # if its line would hide the number, the number stands beyond it
                end = level if -0.01 < level - share < 0.12 else share
                ax.text(end + 0.01, middle, f"{share:.0%}", va="center", fontsize=8)
    if chance:
        lines, levels = np.arange(len(names)), [chance[name] for name in names]
        ax.vlines(levels, lines - 0.45, lines + 0.45, color=COLOURS[1], linewidth=2, label="chance")
    ax.set(xlim=(0, 1.12), xlabel="share of images", ylabel="attribute", title=title)
    ax.xaxis.set_major_formatter("{x:.0%}")
    if chance or not alone:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def curves(rows: Sequence[dict], panels: dict[str, dict[str, str]], x: str = "step") -> Figure:
    """Line charts of logged rows: `panels` maps a panel's title to {column: label}."""
    frame = pd.DataFrame(rows)
    figure, axes = panels_of(panels, 4, 2.8)
    for ax, title, columns in axes:
        for i, (column, label) in enumerate(columns.items()):
            look = {"label": label, "linestyle": LINES[i % 4], "marker": "o" if len(frame) == 1 else None}
            sns.lineplot(x=frame[x], y=frame[column], estimator=None, legend=False, ax=ax, **look)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel=x, ylabel=title)
        if len(columns) > 1:
            ax.set(ylabel="value", title=title)
            ax.legend()
    return figure


def training_curves(logs: dict[str, Sequence[pd.DataFrame]], panels: dict[str, str]) -> Figure:
    """Losses against steps, one panel a column: each variant its colour and line, seeds thin, their mean thick.

    `logs`: {variant: one log (`grid.training_log`) a seed}; `panels`: {column: its name}.
    """
    figure, axes = panels_of(panels, 4.5, 2.7, 2)
    looks = {name: {**style.look(name), "linestyle": LINES[i % 4]} for i, name in enumerate(logs)}
    for name, seeds in logs.items():
        thin, thick = {**looks[name], "marker": None, "lw": 0.6, "alpha": 0.5}, {**looks[name], "lw": 1.7, "mew": 0}
        every = max(1, len(seeds[0]) // 5)
        for ax, column, _ in axes:
            for log in seeds if len(seeds) > 1 else ():
                sns.lineplot(log, x="step", y=column, estimator=None, ax=ax, **thin)
            sns.lineplot(pd.concat(seeds), x="step", y=column, errorbar=None, markevery=every, ax=ax, **thick)
    for ax, _, name in axes:
        ax.set(xlabel="step", ylabel=name)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legend(figure, looks)
    return figure


def settling_figure(moves: dict[str, Tensor]) -> Figure:
    """`paper_versus_code.settling` (T-1,N) of each "variant, seed N", by layer: mean and middle 80 % of the images."""
    figure, ax = one_panel(6.4, 3.0)
    for i, (name, each) in enumerate(moves.items()):
        look = {**style.look(name.split(", ")[0]), "marker": MARKERS[i % 7], "linestyle": LINES[i % 4], "label": name}
        layers = np.arange(2, len(each) + 2).repeat(each.shape[1])
        sns.lineplot(x=layers, y=each.flatten().numpy(), errorbar=("pi", 80), legend=False, mew=0, ax=ax, **look)
    ax.axhline(0.05, color=GREY, linestyle="--", linewidth=1, label="5 %")
    ax.set(xlabel="layer t", ylabel=r"movement $\|h_t-h_{t-1}\|\,/\,\|h_t\|$", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return figure


def histograms(panels: dict[str, Sequence[float]]) -> Figure:
    """One histogram a panel, {name: values}: a bar a value, or 30 bars where there are more values."""
    figure, axes = panels_of(panels, 3.4, 2.4, len(panels))
    for ax, name, values in axes:
        sns.histplot(x=values, bins=30, discrete=len(np.unique(values)) <= 30, alpha=1, linewidth=0.3, ax=ax)
        ax.set(xlabel=name, ylabel="count")
    return figure


def distances(spaces: dict[str, Neighbours]) -> Figure:
    """Shares of images whose nearest training image is within a distance: generated beside real test images."""
    figure, panels = panels_of(spaces, 4, 2.9, len(spaces), sharey=True)
    for ax, space, each in panels:
        sns.ecdfplot(x=each.generated.numpy(), color=style.look("main run")["color"], label="generated", ax=ax)
        sns.ecdfplot(x=each.real.numpy(), color=GREY, linestyle="--", label="real test images", ax=ax)
        ax.set(title=space, xlabel="distance to the nearest training image", ylabel="share of images")
        ax.set(xlim=(0, None), ylim=(0, 1.02))
        ax.yaxis.set_major_formatter("{x:.0%}")
        ax.legend()
    return figure


def generation_cost(frame: pd.DataFrame) -> Figure:
    """Latency, throughput and memory against the batch size, one line for each model and device.

    `frame`: rows of `cost.generation` with a column `model`. The band: the middle half of the measured times.
    """
    names = {"ms": "time of a batch (ms)", "images_per_second": "images a second", "memory_mib": "tensors (MiB)"}
    figure, panels = panels_of(names, 3.2, 3.1)
    looks, devices, batches = {}, list(frame["device"].unique()), sorted(frame["batch"].unique())
    for (model, device), part in frame.groupby(["model", "device"], sort=False):
        look = looks[f"{model}, {device.upper()}"] = {**style.look(model), "linestyle": LINES[devices.index(device)]}
        for ax, column, _ in panels:
            sns.lineplot(part, x="batch", y=column, errorbar=None, markeredgewidth=0, markersize=5, ax=ax, **look)
        figure.axes[0].fill_between(part.batch, part.ms_low, part.ms_high, color=look["color"], alpha=0.2, lw=0)
    for ax, _, name in panels:
        ax.set_xscale("log", base=2)
        ax.set_xticks(batches, batches)
        ax.set(yscale="log", xlabel="images in a batch", ylabel=name)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    _legend(figure, looks)
    return figure


def spectrum_figure(spectra: dict[str, Tensor], combs: dict[str, Tensor]) -> Figure:
    """Mean `radial_spectrum` of sets of images, the same relative to the first set, and their mean `comb`."""
    own, period = next(iter(spectra.values())).mean(0)[1:].numpy(), next(iter(combs.values())).shape[1]
    names = ("mean radial power spectrum", f"spectrum relative to {next(iter(spectra))}", "share of the squared steps")
    figure, ((left, *_), (middle, *_), (right, *_)) = panels_of(dict.fromkeys(names), 3.7, 3.1)
    for i, (name, each) in enumerate(spectra.items()):
        mean, look = each.mean(0)[1:].numpy(), {"color": COLOURS[i], "linestyle": LINES[i]}
        sns.lineplot(x=range(1, len(mean) + 1), y=mean, label=name, ax=left, **look)
        sns.lineplot(x=range(1, len(mean) + 1), y=mean / own, ax=middle, **look)
    bars = pd.DataFrame({name: each.mean(0).numpy() for name, each in combs.items()}, range(1, period + 1))
    bars = bars.melt(ignore_index=False).reset_index()
    columns = {"x": "index", "y": "value", "hue": "variable", "palette": COLOURS[: len(combs)]}
    sns.barplot(bars, **columns, saturation=1, legend=False, errorbar=None, ax=right)
    right.axhline(1 / period, color=GREY, linestyle="--", linewidth=1)
    left.set(xscale="log", yscale="log")
    for ax, name in zip(figure.axes, names, strict=True):
        ax.set(xlabel="spatial frequency (cycles an image)", ylabel=name)
    right.set_xlabel(f"step between neighbours, modulo {period}")
    return figure


def heatmap(
    values: Tensor, rows: Sequence[str] = (), images: Sequence[Tensor] = (), title: str = "", x="image", y="caption"
) -> Figure:
    """A matrix (R,C) of cosines as colours, zero white; names of the rows at the left, images (3,H,W) of the columns
    on top. `x` and `y`: what columns and rows are, which are counted from 1.
    """
    frame = pd.DataFrame(values.double().numpy())
    height, width = frame.shape
    side, words = min(0.5, max(0.16, 4 / width)), 0.065 * max(map(len, rows), default=0)
    figure, ax = one_panel(1.5 + words + side * width, 1.0 + side * (height + bool(len(images))))
    limit, step = frame.abs().to_numpy().max(), 1 + width // 14
    rows = [name.replace("$", r"\$") for name in rows]  # captions are words: a "$" is a dollar
    ticks = [i if (i - 1) % step == 0 else "" for i in range(1, max(frame.shape) + 1)]
    look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "cbar_kws": {"label": "cosine", "shrink": 0.7}}
    sns.heatmap(frame, xticklabels=ticks[:width], yticklabels=rows or ticks[:height], square=True, ax=ax, **look)
    for column, picture in enumerate(images):
        box = (column + 0.04, column + 0.96, -0.1, -1.02)
        ax.imshow(as_pixels(picture), extent=box, interpolation="nearest")
    ax.set(xlim=(0, width), ylim=(height, -1.06 if len(images) else 0), xlabel=x, ylabel=y, title=title)
    ax.tick_params(length=0, labelrotation=0)
    return figure


def reach_figure(moved: dict[str, Tensor]) -> Figure:
    """`paper_versus_code.reach` of several generators side by side on one logarithmic scale; grey: exactly zero."""
    figure, panels = panels_of(moved, 3.5 + 0.9 / len(moved), 3.4, len(moved))
    top = max(float(each.max()) for each in moved.values()) or 1.0
    for ax, title, each in panels:
        counted = range(1, len(each) + 1)
        frame, norm = pd.DataFrame(each.numpy(), counted, counted), LogNorm(1e-4 * top, top)
        sns.heatmap(frame, vmin=0, vmax=top, mask=frame == 0, norm=norm, cmap="viridis", cbar=False, square=True, ax=ax)
        ax.set(title=title, xlabel="state of layer", ylabel="perturbed layer", facecolor="#DDDDDD")
        ax.tick_params(labelrotation=0)
        ax.grid(False)
    figure.colorbar(ax.collections[0], ax=figure.axes, shrink=0.8, label="movement (grey: exactly 0)")
    return figure


def study_chart(rows: list[dict]) -> Figure:
    """`rows` of `protocol.study`. Left: the distance against the number of images. Right: every other variant, as a
    multiple of the standard protocol of its aspect; hollow: another extractor or range, another unit of distance.
    """
    others = [row for row in rows if row["aspect"] != "images"]
    figure = Figure(figsize=(10.5, 1.2 + 0.21 * len(others)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    _against_number(left, pd.DataFrame([row for row in rows if row["aspect"] == "images"]))
    _against_standard(right, others)
    return figure


def _against_number(ax: Axes, frame: pd.DataFrame) -> None:
    n, mean, sd = frame["images"], frame["mean"].astype(float), frame["spread"].astype(float).fillna(0)
    sns.lineplot(x=n, y=frame["value"], marker="o", color=COLOURS[0], label="first n generated images", ax=ax)
    if frame["real"].notna().any():
        dashed = {"linestyle": "--", "marker": "s", "color": GREY, "label": "first n real test images"}
        sns.lineplot(x=n, y=frame["real"].astype(float), ax=ax, **dashed)
    ax.fill_between(n, mean - sd, mean + sd, color=COLOURS[0], alpha=0.2, lw=0, label="mean ± sd of disjoint sets of n")
    ax.set(xscale="log", ylim=(0, None))
    ax.set_xticks(n, [str(each) for each in n])
    ax.minorticks_off()
    ax.set(xlabel="n, number of images", ylabel=frame["label"][0], title="the same generator, more images")
    ax.legend()


def _against_standard(ax: Axes, rows: list[dict]) -> None:
    standard: dict[str, dict] = {}
    low, high, names = MULTIPLES[0], MULTIPLES[-1], []
    for line, row in enumerate(rows):
        first = standard.setdefault(row["aspect"], row)
        colour = COLOURS[(len(standard) - 1) % len(COLOURS)]  # the rows of an aspect stand together
        times = max(row["value"], 1e-12) / max(first["value"], 1e-12)
        marker = "<" if times < low else ">" if times > high else "o"
        fill = colour if row["label"] == first["label"] else "white"
        ax.plot(min(max(times, low), high), -line, marker, color=colour, mfc=fill, ms=6, clip_on=False)
        value = f"{row['value']:#.3g}".rstrip(".")
        ax.text(1.03, -line, value, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
        names.append(f"{row['aspect']}: {row['variant']}" if row is first else row["variant"])
        if row is first and line:
            ax.axhline(0.5 - line, color="0.85", linewidth=0.8)
    ax.axvline(1, color=GREY, linewidth=1, linestyle=":", zorder=0)
    ax.set(xscale="log", xlim=(low, high), ylabel="aspect of the protocol: variant", title="one change at a time")
    ax.set_xlabel("multiple of the first of its group (arrows: beyond; hollow: another unit)")
    ax.set_xticks(MULTIPLES, [f"{times:g}" for times in MULTIPLES])
    ax.minorticks_off()
    ax.set_yticks([-line for line in range(len(rows))], names)
    ax.set_title("distance", fontsize=8, loc="right")
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
