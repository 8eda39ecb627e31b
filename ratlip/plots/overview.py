"""Pictures and charts of notebook 8, each kept as PNG (for the page) and SVG (for print)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from ratlip.plots.charts import COLOURS, LINES, MARKERS
from ratlip.plots.pictures import figure_path, save
from ratlip.training.generation import generate
from ratlip.training.step import sample_latents


def keep(figure: Figure, report: str | Path | None, name: str) -> Figure:
    """Save <report>/figures/<name>.png and .svg (nowhere without a report), and hand the figure on."""
    return save(figure, figure_path(report, f"{name}.png"))


def training_curves(logs: dict[str, Sequence[pd.DataFrame]], panels: dict[str, str], smooth: int = 1) -> Figure:
    """Losses against steps, one panel a column: each variant its colour and line, seeds thin, their mean thick.

    `logs`: {variant: one log (`experiments.training_log`) a seed}; `panels`: {column: title}; `smooth`: rows of a
    running mean.
    """
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9, 2.5 * rows + 0.3 + 0.2 * -(-len(logs) // 4)), layout="constrained")
    axes = figure.subplots(rows, min(2, len(panels)), squeeze=False).ravel()
    styles = list(zip(itertools.cycle(COLOURS), itertools.cycle(LINES), itertools.cycle(MARKERS), range(len(logs))))
    for ax, (column, title) in zip(axes, panels.items()):
        for seeds, (colour, line, marker, _) in zip(logs.values(), styles):
            series = [log.set_index("step")[column].rolling(smooth, min_periods=1).mean() for log in seeds]
            for one in series if len(series) > 1 else ():
                ax.plot(one.index, one, line, color=colour, linewidth=0.6, alpha=0.5)
            mean = pd.concat(series, axis=1).mean(axis=1)
            ax.plot(
                mean.index,
                mean,
                line,
                color=colour,
                linewidth=1.7,
                marker=marker,
                markersize=4,
                markevery=max(1, len(mean) // 5),
            )
        ax.set_title(title, fontsize=10)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel("step", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles = [
        Line2D([], [], color=colour, linestyle=line, marker=marker, markersize=4, label=name)
        for name, (colour, line, marker, _) in zip(logs, styles)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False, handlelength=3)
    return figure


def generation_cost(frame: pd.DataFrame) -> Figure:
    """Latency, throughput and memory against the batch size, one line for each model and device.

    `frame`: rows of `cost.generation` with a column `model`.
    """
    panels = {
        "ms": "time of a batch (ms)",
        "images_per_second": "images a second",
        "memory_mib": "tensors beside the weights (MiB)",
    }
    figure = Figure(figsize=(9.6, 3.1), layout="constrained")
    axes = figure.subplots(1, 3)
    for i, ((model, device), part) in enumerate(frame.groupby(["model", "device"], sort=False)):
        style = {"color": COLOURS[i % 7], "linestyle": LINES[i % 4], "marker": MARKERS[i % 7], "markersize": 4}
        for ax, column in zip(axes, panels):
            ax.plot(part.batch, part[column], label=f"{model}, {device.upper()}", linewidth=1.5, **style)
        axes[0].fill_between(part.batch, part.ms_low, part.ms_high, color=style["color"], alpha=0.2, linewidth=0)
    for ax, title in zip(axes, panels.values()):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(sorted(frame.batch.unique()), sorted(frame.batch.unique()))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("images in a batch", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3, which="both")
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
        handlelength=3,
    )
    return figure


def distances(spaces: dict) -> Figure:
    """Shares of images whose nearest training image is within a distance: generated beside real test images.

    `spaces`: {space: `neighbours.Neighbours`}.
    """
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots(1, len(spaces), squeeze=False, sharey=True)[0]
    for ax, (space, each) in zip(axes, spaces.items()):
        for values, name, colour, line in (
            (each.generated, "generated", COLOURS[1], "-"),
            (each.real, "real test images", COLOURS[0], "--"),
        ):
            x = np.sort(values.numpy())
            ax.step(
                x,
                np.arange(1, len(x) + 1) / len(x),
                color=colour,
                linestyle=line,
                where="post",
                linewidth=1.7,
                label=name,
            )
        ax.set_title(space, fontsize=10)
        ax.set_xlabel("distance to the nearest training image", fontsize=8)
        ax.set_xlim(left=0)
        ax.set_ylim(0, 1.02)
        ax.yaxis.set_major_formatter("{x:.0%}")
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of images", fontsize=8)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


@torch.no_grad()
def between_captions(run, first: str, last: str, steps: int = 7, seed: int = 1) -> Tensor:
    """Images (steps,3,S,S) in [-1,1] with one latent, the sentence moving in a straight line between two
    captions.
    """
    ends = run.clip.embed_text([first, last])
    path = torch.lerp(ends[:1], ends[1:], torch.linspace(0, 1, steps, device=ends.device)[:, None])
    latent = sample_latents(seed, 0, 1, run.settings.model.latent_size).expand(steps, -1)
    return generate(run.generator, latent, path.cpu())


@torch.no_grad()
def between_latents(run, caption: str, steps: int = 7, seed: int = 1) -> Tensor:
    """Images (steps,3,S,S) in [-1,1] of one caption, the latent turning from one draw to another.

    It turns rather than cuts across (a great circle): halfway along a straight line, a normal draw is shorter
    than any that the generator knows.
    """
    first, last = sample_latents(seed, 0, 2, run.settings.model.latent_size)
    angle = torch.linspace(0, torch.pi / 2, steps)[:, None]
    return generate(
        run.generator, angle.cos() * first + angle.sin() * last, run.clip.embed_text([caption]).cpu().expand(steps, -1)
    )


def step_sizes(paths: Tensor) -> list[float]:
    """Root mean square change of the pixels ([-1,1]) between the ends of each of paths (P,steps,3,S,S)."""
    return [float((path[-1] - path[0]).square().mean().sqrt()) for path in paths]
