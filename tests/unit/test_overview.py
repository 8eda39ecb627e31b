"""Pictures of notebook 8 (`ratlip.plots.overview`)."""

import pandas as pd
import pytest
import torch

from ratlip.plots import overview
from ratlip.studies import neighbours
from ratlip.training import generation
from ratlip.training.step import sample_latents


@pytest.fixture(scope="module")
def run(smoke):
    return generation.Run(smoke.run)


def logs(seeds: int) -> list[pd.DataFrame]:
    return [pd.DataFrame({"step": [2, 4, 6], "g_logit": [0.0, seed, 2.0 * seed]}) for seed in range(seeds)]


def test_curves_have_a_thin_line_a_seed_and_a_thick_one_an_arm():
    figure = overview.training_curves({"CAT": logs(2), "RAT": logs(1)}, {"g_logit": "logit"})
    lines = figure.axes[0].lines
    assert [line.get_linewidth() for line in lines] == [0.6, 0.6, 1.7, 1.7]
    assert lines[2].get_ydata().tolist() == [0, 0.5, 1]
    assert lines[2].get_linestyle() != lines[3].get_linestyle() and lines[2].get_marker() != lines[3].get_marker()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CAT", "RAT"]


def test_kept_as_png_and_as_the_same_svg_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "repository", lambda: tmp_path)
    figure = overview.training_curves({"CAT": logs(1)}, {"g_logit": "logit"})
    assert overview.keep(figure, "reports/x", "curves") is figure
    folder = tmp_path / "reports/x/figures"
    first = (folder / "curves.svg").read_bytes()
    assert (folder / "curves.png").stat().st_size > 1000 and b"<dc:date>" not in first
    overview.keep(overview.training_curves({"CAT": logs(1)}, {"g_logit": "logit"}), "reports/x", "curves")
    assert (folder / "curves.svg").read_bytes() == first
    overview.keep(figure, None, "other")
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "curves.svg"]


def test_paths_begin_and_end_at_their_captions_and_noises(run):
    first, last = "a large red ring on a black background", "a small blue square on a white background"
    size = run.settings.model.latent_size
    words = overview.between_captions(run, first, last, steps=5)
    latents = overview.between_latents(run, first, steps=5)
    ends = run.clip.embed_text([first, last]).cpu()
    one = sample_latents(1, 0, 1, size).expand(2, -1)
    assert torch.allclose(words[[0, -1]], generation.generate(run.generator, one, ends), atol=1e-5)
    two = generation.generate(run.generator, sample_latents(1, 0, 2, size), ends[:1].expand(2, -1))
    assert torch.allclose(latents[[0, -1]], two, atol=1e-5)
    assert words.shape == latents.shape == (5, 3, 16, 16)


def test_step_sizes():
    path = torch.zeros(1, 3, 3, 4, 4)
    path[0, -1] = 0.5
    assert overview.step_sizes(path) == [0.5]


def test_charts_of_cost_and_distances():
    frame = pd.DataFrame(
        [
            {
                "model": "CAT",
                "device": device,
                "batch": batch,
                "ms": 2.0 * batch,
                "ms_low": batch,
                "ms_high": 3.0 * batch,
                "images_per_second": 500.0,
                "memory_mib": batch,
            }
            for device in ("cpu", "cuda")
            for batch in (1, 2, 4)
        ]
    )
    figure = overview.generation_cost(frame)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CAT, CPU", "CAT, CUDA"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [2, 4, 8]
    numbers = torch.zeros(4, dtype=torch.long)
    each = neighbours.Neighbours(torch.tensor([4.0, 1, 2, 3]), torch.tensor([5.0, 6, 7, 8]), numbers, numbers)
    line = overview.distances({"pixels": each}).axes[0].lines[0]
    assert line.get_xdata().tolist() == [1, 2, 3, 4] and line.get_ydata().tolist() == [0.25, 0.5, 0.75, 1]
