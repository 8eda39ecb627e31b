"""Charts of many runs show what they are given: every seed as a dot, every mean, every name."""

import numpy as np
import pandas as pd
import torch

from ratlip.plots import charts
from ratlip.studies.compare import Difference

FRAME = pd.DataFrame(
    [
        {"label": label, "seed": seed, "h": h, "fd": 2.0 * h + seed}
        for label, h in (("h = 0", 0), ("h = 4", 4))
        for seed in (0, 1)
    ]
)


def test_by_variant_has_a_dot_a_seed_and_a_bar_at_the_mean(tmp_path):
    figure = charts.by_variant(
        FRAME, {"fd": "a rather long name of a score\n(lower is better)"}, {"fd": 1.5}, path=tmp_path / "a.png"
    )
    ax = figure.axes[0]
    dots, bars = ax.lines[0:4:2], ax.lines[1:4:2]
    assert [sorted(line.get_xdata()) for line in dots] == [[0, 1], [8, 9]]
    assert [line.get_xdata()[0] for line in bars] == [0.5, 8.5]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["h = 0", "h = 4"]
    assert ax.lines[4].get_xdata()[0] == 1.5 and (tmp_path / "a.png").is_file()
    assert max(map(len, ax.get_title().splitlines())) <= 28


def test_against_gives_each_value_equal_room():
    figure = charts.against(FRAME, "h", {"fd": "FD", "seed": "seed"})
    mean, dots = figure.axes[0].lines
    assert list(mean.get_xdata()) == [0, 1] and list(mean.get_ydata()) == [0.5, 8.5]
    assert sorted(dots.get_ydata()) == [0, 1, 8, 9]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0", "4"]


def test_intervals_name_their_verdicts_and_cut_what_is_too_wide():
    figure = charts.intervals(
        {
            "A beats B": Difference(1.0, 0.5, 1.5, 3, "supported"),
            "C beats D": Difference(0.2, -np.inf, np.inf, 1, "undecided"),
        }
    )
    ax = figure.axes[0]
    assert {text.get_text().strip() for text in ax.texts} == {"supported", "undecided"}
    assert all(np.isfinite(line.get_xdata()).all() for line in ax.lines)


def test_samples_have_a_row_a_caption_and_a_column_a_model():
    figure = charts.samples(torch.zeros(2, 3, 3, 8, 8), ["a", "b"], ["x", "y", "z"])
    assert sum(len(ax.images) for ax in figure.axes) == 6
    assert [ax.get_title() for ax in figure.axes[1:4]] == ["x", "y", "z"]
