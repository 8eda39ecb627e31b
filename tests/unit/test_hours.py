"""Hours of a grid: from steps that were measured on that device at that size, or not at all."""

import json

import pytest

from ratlip.settings import load_settings
from ratlip.studies import grid, hours


def measurement(path, *cases):
    """A report of `cases`: (accelerators, overrides of the case, median seconds), one section each."""
    sections = {}
    for number, (cards, case, seconds) in enumerate(cases):
        usual = {"kind": "steps", "form": "fast", "profile": "smoke", "batch": 8, "threads": 2, "accelerator": "auto"}
        environment = {"accelerators": cards, "processor": "a processor"}
        found = {"case": usual | case, "found": {"seconds": {"median": seconds}}}
        sections[f"s{number}"] = {"environment": environment, "cases": [found]}
    path.write_text(json.dumps({"sections": sections}))
    return path


@pytest.fixture
def smoke_grid():
    settings = load_settings("smoke")
    return settings, grid.unique(grid.plan(settings))


def test_where_no_gpu_was_measured_it_is_said_and_no_number_made_up(smoke_grid, tmp_path):
    settings, runs = smoke_grid
    others = ({"batch": 4}, {"profile": "demo"}, {"form": "plain"}, {"settings": {"model.hidden_size": 4}})
    path = measurement(tmp_path / "p.json", *[(["a card"], each, 9.0) for each in others], ([], {}, 36.0))
    lines = hours.forecast(settings, runs, tmp_path, path)
    assert lines[0] == f"{len(runs)} trainings left, {8 * len(runs)} steps"
    assert lines[1].startswith(f"{8 * len(runs) * 36 / 3600:.3g} hours of a processor, 2 threads: 36 s a step")
    assert (
        lines[2].startswith("GPU hours: unknown, no step of smoke at batch 8 was measured on a GPU") and len(lines) == 3
    )
    assert len(hours.forecast(settings, runs, tmp_path, tmp_path / "none.json")) == 2


def test_measured_on_a_gpu(smoke_grid, tmp_path):
    settings, runs = smoke_grid
    path = measurement(
        tmp_path / "p.json", (["a card"], {}, 2.0), (["a card"], {}, 4.0), (["a card"], {"accelerator": "cpu"}, 50.0)
    )
    lines = hours.forecast(settings, runs[:3], tmp_path, path)
    assert lines[1].startswith(f"{24 * 3 / 3600:.3g} hours of GPU (a card): 3 s a step") and "unknown" not in str(lines)
    assert hours.forecast(settings, [], tmp_path, path) == []


def test_epochs_are_counted_in_prepared_images(tmp_path):
    settings = load_settings("cub")
    runs = grid.plan(settings, "sweep")[:2]
    assert hours.forecast(settings, runs, tmp_path) == [
        "2 trainings left; how many steps an epoch has is known once the data are prepared"
    ]
    folder = tmp_path / f"prepared-{settings.data_hash}"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"counts": {"train": 33}}))
    assert hours.steps(settings, tmp_path) == 1500 * 3


def test_the_command_prints_it(ratlip, tmp_path):
    status, out, _ = ratlip("grid", "-p", "smoke", "--out", tmp_path, "--group", "sweep", "--hours")
    assert status == 0 and "9 trainings left, 72 steps" in out.replace("\n", " ") and "GPU hours: unknown" in out
