"""One colour a variant on every figure, and one way to keep a figure."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from ratlip.plots import charts, pictures, style
from ratlip.settings import load_settings
from ratlip.studies import grid


def simple() -> Figure:
    figure = Figure()
    figure.subplots().plot([1, 3, 2], label="a line")
    return figure


def test_kept_as_png_and_as_the_same_svg_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "repository", lambda: tmp_path)
    figure = simple()
    assert style.keep(figure, "reports/x", "curves") is figure
    folder = tmp_path / "reports/x/figures"
    first = (folder / "curves.svg").read_bytes()
    assert (folder / "curves.png").stat().st_size > 1000 and b"<dc:date>" not in first
    style.keep(simple(), "reports/x", "curves")
    assert (folder / "curves.svg").read_bytes() == first
    for nothing in (None, ""):
        assert style.keep(figure, nothing, "other") is figure
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "curves.svg"]


def test_saving_leaves_no_half_file(tmp_path):
    with pytest.raises(ValueError):
        style.write(simple(), tmp_path / "x.nonsense")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "jpg"])
def test_a_plain_path_in_the_format_of_its_suffix(tmp_path, suffix):
    style.write(simple(), tmp_path / f"x.{suffix}")
    start = (tmp_path / f"x.{suffix}").read_bytes()[:8]
    assert start.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml", "jpg": b"\xff\xd8"}[suffix])


def test_a_sample_grid_is_the_same_with_and_without_the_theme_of_the_charts(tmp_path):
    """The runs of a notebook, which imports seaborn, and those of the command line, which does not."""
    images = torch.linspace(-1, 1, 2 * 3 * 3 * 8 * 8).view(2, 3, 3, 8, 8)
    themed, plain = tmp_path / "themed.png", tmp_path / "plain.png"
    assert matplotlib.rcParams["axes.grid"]  # `charts` is imported above
    pictures.caption_grid(images, ["one", "two"], themed, title="step 4", real=images[:, 0])
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        pictures.caption_grid(images, ["one", "two"], plain, title="step 4", real=images[:, 0])
    assert themed.read_bytes() == plain.read_bytes()


def test_every_variant_of_the_grid_has_a_colour_and_a_marker_of_its_own():
    settings = load_settings("demo")
    assert {name for group in ("ablation", "versus", "study") for name in grid.variants(settings, group)} < {
        *style.VARIANTS
    }
    assert len({*style.VARIANTS.values()}) == len({colour for colour, _ in style.VARIANTS.values()}) == 14
    sizes = [style.look(label) for label in grid.variants(settings, "sweep")]
    light = [np.dot(to_rgb(each["color"]), (0.3, 0.6, 0.1)) for each in sizes]
    assert light == sorted(light) and len({each["color"] for each in sizes}) == len(sizes)  # a sequence
    known = {colour for colour, _ in style.VARIANTS.values()}
    new = [style.look(f"a variant of tomorrow, {i}") for i in range(len(style.FREE))]
    assert len({each["color"] for each in new}) == len(new) and not {each["color"] for each in new} & known
    assert new[0] == style.look("a variant of tomorrow, 0") and not known & {*style.FREE}


def test_a_variant_has_the_same_colour_on_every_figure(monkeypatch):
    """Two variants, in another order and with others beside them."""
    names, others = ["CAT", "RAT + SA"], ["h = 8", "RAT + SA", "one of my own", "CAT"]

    def colours(labels: list[str]) -> list[dict[str, str]]:
        logs = {name: [pd.DataFrame({"step": [1, 2], "loss": [1.0, 2]})] for name in labels}
        runs = pd.DataFrame({"label": labels, "fd": 1.0, "x": 1})
        cost = runs.assign(model=labels, device="cpu", batch=1, ms=1.0, ms_low=1, ms_high=1, images_per_second=1.0)
        table = pd.DataFrame({"margin": [1.0], "se": 1.0}, index=["area"])
        drawn = {
            "curves": charts.training_curves(logs, {"loss": "loss"}).axes[0].lines,
            "cost": charts.generation_cost(cost.assign(memory_mib=1.0)).axes[1].lines,
            "against": charts.against(runs, "x", {"fd": "FD"}, hue="label").axes[0].lines,
            "leads": [each.lines[0] for each in charts.leads({name: table for name in labels}).axes[0].containers],
        }
        found = [
            {name: to_hex(line.get_color()) for name, line in zip(labels, lines, strict=True)}
            for lines in drawn.values()
        ]
        dots = charts.by_variant(runs, {"fd": "FD"}).axes[0].collections[0].get_facecolors()
        return [*found, {name: to_hex(colour) for name, colour in zip(labels, dots, strict=True)}]

    every = [*colours(names), *colours(others)]
    assert len(every) == 10
    for name in (*names, *others):
        want = style.look(name)["color"].lower()
        assert {each[name] for each in every if name in each} == {want}, name


def test_charts_leave_the_random_states_of_torch_and_numpy_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    frame = pd.DataFrame({"label": ["CAT"] * 30, "h": 0, "fd": range(30)})
    charts.by_variant(frame, {"fd": "FD"})
    charts.against(frame, "h", {"fd": "FD"})
    charts.settling_figure({"one": torch.ones(5, 4)})
    charts.shares({"one": {"a": 0.5}})
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
