"""Charts show what they are given: every seed as a dot, every mean, every name; and every axis is labelled."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from ratlip.plots import charts
from ratlip.studies import grad_cam, neighbours, protocol
from ratlip.studies.compare import Difference

FRAME = pd.DataFrame(
    [
        {"label": label, "seed": seed, "h": h, "fd": 2.0 * h + seed}
        for label, h in (("h = 0", 0), ("h = 4", 4))
        for seed in (0, 1)
    ]
)
MAPS = pd.DataFrame(
    {
        "label": ["h = 0", "h = 0", "h = 8", "h = 8"],
        "seed": [0, 1, 0, 1],
        "hidden_size": [0, 0, 8, 8],
        "method": "m",
        "coverage": [0.5, 0.52, 0.9, 0.921],
    }
)
CLAIMS = {
    "A beats B": Difference(1.0, 0.5, 1.5, 3, "supported"),
    "C beats D": Difference(0.2, -np.inf, np.inf, 1, "undecided"),
}
MARGINS = pd.DataFrame({"margin": [0.1, 0.2, 0.3, -0.1], "se": 0.05}, index=list(grad_cam.CONTROLS))
ROWS = [{"step": step, **{name: step * i for i, name in enumerate("abcdef")}} for step in (1, 2, 4)]
COST = pd.DataFrame(
    [
        {"model": "CAT", "device": device, "batch": batch, "ms": 2.0 * batch, "ms_low": batch, "ms_high": 3.0 * batch}
        | {"images_per_second": 500.0, "memory_mib": batch}
        for device in ("cpu", "cuda")
        for batch in (1, 2, 4)
    ]
)
NUMBERS = torch.zeros(4, dtype=torch.long)
NEAR = neighbours.Neighbours(torch.tensor([4.0, 1, 2, 3]), torch.tensor([5.0, 6, 7, 8]), NUMBERS, NUMBERS)
SPECTRA = {"a": torch.rand(3, 9), "b": torch.rand(3, 9)}, {"a": torch.rand(3, 7).double(), "b": torch.rand(3, 7)}


def logs(seeds: int) -> list[pd.DataFrame]:
    return [pd.DataFrame({"step": [2, 4, 6], "g_logit": [0.0, seed, 2.0 * seed]}) for seed in range(seeds)]


def names_at(ax, axis: str) -> list[str]:
    return [tick.get_text() for tick in getattr(ax, f"get_{axis}ticklabels")()]


@pytest.fixture(scope="module")
def study(smoke):
    return protocol.study(smoke.workspace)


def every_chart(study) -> dict[str, Figure]:
    """One figure a public function of the module."""
    made = {
        "by_variant": charts.by_variant(FRAME, {"fd": "FD", "seed": "seed"}, {"fd": 1.5}),
        "spread_figure": charts.spread_figure({"a": [0, 1], "b": [2, 2]}, "x", {"mean": 1}),
        "against": charts.against(FRAME, "h", {"fd": "FD", "seed": "seed"}),
        "intervals": charts.intervals(CLAIMS),
        "leads": charts.leads({"a": MARGINS, "b": MARGINS}),
        "shares": charts.shares({"all": {"colour": 0.5}}),
        "curves": charts.curves(ROWS, {"several": {"a": "A", "b": "B"}, "one": {"f": "F"}}),
        "training_curves": charts.training_curves({"CAT": logs(2)}, {"g_logit": "logit"}),
        "settling_figure": charts.settling_figure({"one": torch.rand(5, 4)}),
        "histograms": charts.histograms({"words a caption": [1, 2, 2], "height in pixels": np.arange(100)}),
        "distances": charts.distances({"pixels": NEAR, "independent CLIP": NEAR}),
        "generation_cost": charts.generation_cost(COST),
        "spectrum_figure": charts.spectrum_figure(*SPECTRA),
        "heatmap": charts.heatmap(torch.rand(2, 3), ["one", "two"], list(torch.rand(3, 3, 4, 4))),
        "reach_figure": charts.reach_figure({"none": torch.zeros(3, 3), "some": torch.ones(4, 4).triu(1)}),
        "study_chart": charts.study_chart(study),
    }
    functions = inspect.getmembers(charts, lambda each: inspect.isfunction(each) and each.__module__ == charts.__name__)
    assert set(made) == {name for name, _ in functions if name[0] != "_"}
    return made


def test_every_axis_of_every_chart_has_a_label_and_every_chart_can_be_drawn(study, tmp_path):
    for name, figure in every_chart(study).items():
        panels = [ax for ax in figure.axes if ax.axison and ax.get_label() != "<colorbar>"]
        assert panels, name
        for ax in panels:  # that of a shared axis stands at the first of the row
            row = [other for other in panels if other is ax or ax.get_shared_y_axes().joined(ax, other)]
            assert ax.get_xlabel() and any(other.get_ylabel() for other in row), name
        for ax in figure.axes:
            assert ax.get_label() != "<colorbar>" or ax.get_ylabel(), name
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 1000, name


def test_by_variant_has_a_dot_a_seed_and_a_bar_at_the_mean():
    figure = charts.by_variant(FRAME, {"fd": "a rather long name of a score\n(lower is better)"}, {"fd": 1.5})
    ax = figure.axes[0]
    dots, bars = ax.collections
    assert [sorted(x for x, y in dots.get_offsets() if y == row) for row in (0, 1)] == [[0, 1], [8, 9]]
    assert [segment[0][0] for segment in bars.get_segments()] == [0.5, 8.5]
    assert names_at(ax, "y") == ["h = 0", "h = 4"]
    assert ax.lines[0].get_xdata()[0] == 1.5 and ax.texts[0].get_text() == "real"
    assert max(map(len, ax.get_xlabel().splitlines())) <= 28


def test_many_dots_of_a_variant_stay_in_its_line_and_apart():
    figure = charts.spread_figure({"a": [1.0] * 50, "b": [2.0] * 50}, "x", {"mean": 1.5})
    heights = np.asarray(figure.axes[0].collections[0].get_offsets())[:, 1]
    assert len(np.unique(heights[:50])) == 50 and np.abs(heights[:50]).max() <= 0.25
    assert np.allclose(heights[:50], heights[50:] - 1)


def test_against_gives_each_value_equal_room():
    figure = charts.against(FRAME, "h", {"fd": "FD", "seed": "seed"})
    ax = figure.axes[0]
    assert list(ax.lines[0].get_xdata()) == [0, 1] and list(ax.lines[0].get_ydata()) == [0.5, 8.5]
    assert sorted(y for dots in ax.collections for _, y in dots.get_offsets()) == [0, 1, 8, 9]
    assert names_at(ax, "x") == ["0", "4"]


def test_against_keeps_the_room_of_a_value_that_nothing_is_known_of():
    frame = FRAME.assign(fd=FRAME["fd"].where(FRAME["h"] > 0))
    ax = charts.against(frame, "h", {"fd": "FD"}).axes[0]
    assert names_at(ax, "x") == ["0", "4"] and ax.get_xlim() == (-0.4, 1.4)
    assert [list(point) for point in ax.collections[0].get_offsets()] == [[1, 8], [1, 9]]


def test_against_has_a_line_a_method_and_the_value_of_real_images_of_each():
    figure = charts.against(MAPS, "hidden_size", {"coverage": "c"}, {"m": {"coverage": 0.7}}, "h", hue="method")
    mean, real = figure.axes[0].lines
    assert list(mean.get_ydata()) == pytest.approx([0.51, 0.9105]) and list(real.get_ydata()) == [0.7, 0.7]
    assert mean.get_color() == real.get_color() and figure.axes[0].get_xlabel() == "h"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["m", "run", "real images"]


def test_intervals_name_their_verdicts_and_cut_what_is_too_wide():
    ax = charts.intervals(CLAIMS).axes[0]
    assert {text.get_text().strip() for text in ax.texts} == {"supported", "undecided"}
    assert all(np.isfinite(line.get_xdata()).all() for line in ax.lines)


def test_leads_name_their_controls():
    assert names_at(charts.leads({"a": MARGINS}).axes[0], "y") == [f"map - {name}" for name in grad_cam.CONTROLS]


def test_shares_show_their_numbers_and_chance_in_the_order_given():
    figure = charts.shares({"all": {"colour": 0.5, "size": 0.75}}, {"colour": 0.125, "size": 0.5}, title="shares")
    (ax,) = figure.axes
    assert names_at(ax, "y") == ["colour", "size"] and ax.yaxis_inverted()  # drawn from above
    assert [patch.get_width() for patch in ax.containers[0]] == [0.5, 0.75]
    assert [segment[0][0] for segment in ax.collections[0].get_segments()] == [0.125, 0.5]
    assert [text.get_text() for text in ax.texts] == ["50%", "75%"]
    assert charts.shares({"all": {"colour": 0.5}}).axes[0].get_legend() is None


def test_shares_of_two_groups_stand_beside_each_other_with_their_errors():
    groups = {"generated": {"colour": 0.5, "size": 0.75}, "real": {"size": 1.0, "colour": 0.9}}
    (ax,) = charts.shares(groups, errors={"generated": {"colour": 0.1, "size": 0.2}}).axes
    bars = [each for each in ax.containers if len(each) == 2 and hasattr(each[0], "get_width")]
    assert [[patch.get_width() for patch in each] for each in bars] == [[0.5, 0.75], [0.9, 1.0]]
    ends = [each.lines[2][0].get_segments()[0][:, 0].tolist() for each in ax.containers if each not in bars]
    assert ends == [pytest.approx([0.4, 0.6]), pytest.approx([0.55, 0.95])] and not ax.texts
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["generated", "real"]


def test_curves_draw_every_column_of_every_panel():
    figure = charts.curves(ROWS, {"five": {name: name.upper() for name in "abcde"}, "one": {"f": "F"}})
    five, one = figure.axes
    assert [line.get_label() for line in five.lines] == list("ABCDE")
    assert five.lines[4].get_xdata().tolist() == [1, 2, 4]
    assert five.lines[4].get_ydata().tolist() == [4, 8, 16]
    assert len(one.lines) == 1 and one.get_legend() is None and five.get_legend() is not None


def test_training_curves_have_a_thin_line_a_seed_and_a_thick_one_a_variant():
    figure = charts.training_curves({"CAT": logs(2), "RAT": logs(1)}, {"g_logit": "logit"})
    lines = figure.axes[0].lines
    assert [line.get_linewidth() for line in lines] == [0.6, 0.6, 1.7, 1.7]
    assert lines[2].get_ydata().tolist() == [0, 0.5, 1]
    assert lines[2].get_linestyle() != lines[3].get_linestyle() and lines[2].get_marker() != lines[3].get_marker()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CAT", "RAT"]


def test_settling_shows_the_mean_and_the_middle_of_the_images():
    moves = torch.rand(5, 40)
    ax = charts.settling_figure({"one": moves}).axes[0]
    assert ax.lines[0].get_xdata().tolist() == [2, 3, 4, 5, 6]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), moves.mean(1), rtol=1e-5)
    edge = ax.collections[0].get_paths()[0].vertices
    low, high = moves.quantile(torch.tensor([0.1, 0.9]), dim=1).numpy()
    for layer, *ends in zip((2, 3, 4, 5, 6), low, high, strict=True):
        found = edge[edge[:, 0] == layer, 1]
        assert [found.min(), found.max()] == pytest.approx(ends, rel=1e-5)


def test_histograms_count_every_value():
    few, many = charts.histograms({"few": [1, 2, 2, 5], "many": np.arange(300)}).axes
    assert [patch.get_height() for patch in few.patches] == [1, 2, 0, 0, 1]
    assert len(many.patches) == 30 and sum(patch.get_height() for patch in many.patches) == 300


def test_charts_of_cost_and_distances():
    figure = charts.generation_cost(COST)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CAT, CPU", "CAT, CUDA"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [2, 4, 8]
    line = charts.distances({"pixels": NEAR}).axes[0].lines[0]  # seaborn's begins at minus infinity
    assert line.get_xdata()[1:].tolist() == [1, 2, 3, 4] and line.get_ydata().tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_spectra_are_means_and_relative_to_the_first():
    spectra, combs = SPECTRA
    left, middle, right = charts.spectrum_figure(spectra, combs).axes
    np.testing.assert_allclose(left.lines[1].get_ydata(), spectra["b"].mean(0)[1:], rtol=1e-6)
    assert (middle.lines[0].get_ydata() == 1).all() and left.lines[0].get_xdata().tolist() == list(range(1, 9))
    heights = [bar.get_height() for bar in right.containers[1]]
    np.testing.assert_allclose(heights, combs["b"].mean(0), rtol=1e-6)


def test_a_dollar_in_the_name_of_a_row_is_a_dollar():
    figure = charts.heatmap(torch.rand(2, 3), [r"a $\undefined$ bird", "$5 and $10"])
    figure.canvas.draw()
    assert [each.get_text() for each in figure.axes[0].get_yticklabels()][1] == r"\$5 and \$10"


def test_a_heatmap_shows_its_matrix_with_zero_in_the_middle():
    values = torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.1, 0.2]])
    ax = charts.heatmap(values, ["one", "two"], list(torch.rand(3, 3, 4, 4))).axes[0]
    mesh = ax.collections[0]
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(2, 3), values, rtol=1e-6)
    assert mesh.get_clim() == (-1, 1) and len(ax.images) == 3
    assert names_at(ax, "y") == ["one", "two"] and names_at(ax, "x") == ["1", "2", "3"]
    many = charts.heatmap(torch.rand(20, 20), x="layer", y="layer").axes[0]
    assert names_at(many, "x")[:4] == ["1", "", "3", ""] and many.get_ylabel() == "layer"


def test_reach_leaves_exact_zeros_grey():
    none, some, _ = charts.reach_figure({"none": torch.zeros(3, 3), "some": torch.ones(4, 4).triu(1)}).axes
    assert none.collections[0].get_array().mask.all()
    assert (~some.collections[0].get_array().mask.reshape(4, 4) == np.triu(np.ones((4, 4)), 1)).all()


def test_the_chart_of_the_study_has_a_dot_for_every_row(study):
    left, right = charts.study_chart(study).axes
    others = [row for row in study if row["aspect"] != "images"]
    dots = [line for line in right.lines if line.get_marker() in "o<>"]
    assert len(dots) == len(right.get_yticks()) == len(others)
    assert left.lines[0].get_xdata().tolist() == [24, 48, 96]
