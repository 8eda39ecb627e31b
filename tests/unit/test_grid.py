"""The grid of runs: which variants, which are missing, that a run can be stopped, and campaigns."""

import json
import time
from pathlib import Path

import pytest

from ratlip.errors import RunError, SettingsError
from ratlip.files import one_writer
from ratlip.settings import load_settings
from ratlip.studies import campaign as campaigns
from ratlip.studies import grid
from ratlip.workspace import Workspace


@pytest.fixture(scope="module")
def settings():
    return load_settings("smoke")


class TestPlan:
    def test_the_ablation_crosses_conditioning_and_attention(self, settings):
        variants = {run.label: run.settings.model.variant for run in grid.plan(settings, "ablation")}
        assert variants == {
            "CAT": "cat-none",
            "CAT + SA": "cat-shuffle",
            "RAT": "rat-h8-none",
            "RAT + SA": "rat-h8-shuffle",
            "RAT in the mapper + SA": "rat-mapper-h8-shuffle",
            "published RAT": "rat-official-h8-none",
            "published RAT + SA": "rat-official-h8-shuffle",
        }

    def test_a_run_that_two_groups_share_is_made_once(self, settings):
        names = {(run.group, run.label, run.seed): run.name for run in grid.plan(settings)}
        assert names["ablation", "CAT + SA", 1] == names["sweep", "h = 0", 1]
        assert names["ablation", "RAT + SA", 0] == names["sweep", "h = 8", 0] == names["versus", "corrected", 0]
        assert names["sweep", "h = 4", 0] != names["sweep", "h = 8", 0]
        runs = grid.unique(grid.plan(settings))
        assert len(runs) == len(set(names.values())) < len(names)
        assert runs[0].group == "ablation"  # the first label is kept

    def test_seeds_and_budget_are_the_profiles(self):
        settings = load_settings("cub", {"experiments.seeds": 2, "experiments.versus_seeds": 4})
        runs = grid.plan(settings)
        assert {run.seed for run in runs if run.group == "sweep"} == {0, 1}
        assert {run.seed for run in runs if run.group == "versus"} == {0, 1, 2, 3}
        assert {run.settings.training.epochs for run in runs} == {settings.training.epochs}
        short = grid.plan(load_settings("cub", {"experiments.steps": 7}), "sweep")
        assert {(run.settings.training.steps, run.settings.training.epochs) for run in short} == {(7, None)}

    def test_the_published_variant_is_the_published_profile(self):
        run = next(run for run in grid.plan(load_settings("demo"), "versus") if run.label == "published")
        profile = load_settings("demo-published", {"training.steps": run.settings.training.steps})
        changed = run.settings.model_dump(exclude={"profile", "summary", "evaluation", "training"})
        assert changed == profile.model_dump(exclude={"profile", "summary", "evaluation", "training"})
        assert run.settings.training.mismatch == "published" and run.settings.training.real_resize == "nearest"

    def test_papermill_is_told_what_differs_and_makes_the_same_run(self, settings, tmp_path):
        for run in grid.unique(grid.plan(settings)):
            given = grid.parameters(run, tmp_path)
            made = load_settings(given["profile"], {**given["settings"], "seed": given["seed"]})
            assert made.run_name == run.name

    def test_a_readers_own_profile_travels_as_a_file(self, tmp_path):
        own = tmp_path / "mine.yaml"
        own.write_text("extends: smoke\ntraining: {batch_size: 4}\n")
        run = grid.plan(load_settings(own), "sweep")[0]
        given = grid.parameters(run, tmp_path)
        made = load_settings(given["profile"], {**given["settings"], "seed": given["seed"]})
        assert made.run_name == run.name and made.training.batch_size == 4 and made.profile == "mine"

    def test_an_unknown_group(self, settings):
        with pytest.raises(ValueError, match="ablation, sweep, versus, study, not 'sweeep'"):
            grid.variants(settings, "sweeep")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    grid = {"experiments.seeds": 1, "experiments.hidden_sizes": [0, 4], "experiments.steps": 2}
    return Workspace.of(load_settings("smoke", grid), tmp_path_factory.mktemp("grid"), progress=False)


class TestRuns:
    def test_missing_runs_are_named_with_their_mend(self, workspace):
        with pytest.raises(RunError, match="2 of 2 runs are missing .*make reproduce PROFILE=smoke"):
            grid.results(workspace, "sweep")

    def test_the_grid_is_made_once_and_read(self, workspace):
        assert grid.complete(workspace, "sweep", runner="library") == []
        before = {path: path.stat().st_mtime_ns for path in workspace.root.glob("runs/*/*")}
        start = time.monotonic()
        grid.complete(workspace, "sweep", runner="library")
        assert time.monotonic() - start < 1
        assert before == {path: path.stat().st_mtime_ns for path in workspace.root.glob("runs/*/*")}
        table = grid.results(workspace, "sweep")
        assert list(table["label"]) == ["h = 0", "h = 4"] and list(table["steps"]) == [2, 2]
        assert table["frechet_distance"].gt(0).all() and table["real.frechet_distance"].gt(0).all()
        assert table["generator_parameters"].gt(1000).all() and table["peak_memory_mib"].gt(50).all()
        opened = grid.open_run(workspace, next(table.iloc[1:].itertuples()))
        assert opened.settings.model.hidden_size == 4
        assert len(grid.training_log(workspace, table["run"][0])) >= 1

    def test_a_run_that_was_stopped_is_gone_on_with(self, workspace):
        done = grid.plan(workspace.settings, "sweep")[1]
        longer = grid.overridden(done.settings, {"training.steps": 6})
        run = grid.Experiment("h = 4", "sweep", 0, longer)
        folder = grid.execute(run, workspace, "library", end=time.monotonic())
        assert not run.complete(workspace.root) and (folder / "checkpoint.pt").is_file()
        grid.execute(run, workspace, "library")
        assert run.complete(workspace.root)
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)) and steps[-1] == 6

    def test_no_run_begins_when_the_time_is_used(self, workspace):
        left = grid.complete(workspace, "versus", runner="library", minutes=0)
        assert {run.label for run in left} == {"corrected", "published", "published normalisation"}


# A campaign stops when its time is used, goes on where it stopped, and its results can be copied.
ROOT = Path(__file__).resolve().parents[2]
STAGES = """
stages:
  - profile: smoke
    group: ablation
    variants: [CAT + SA, RAT + SA]
    settings: {experiments.steps: 3, experiments.seeds: 1}
  - profile: smoke
    group: sweep
    settings: {experiments.steps: 3, experiments.seeds: 1, experiments.hidden_sizes: [0, 4]}
"""


@pytest.fixture
def campaign(tmp_path):
    path = tmp_path / "campaign.yaml"
    path.write_text(STAGES)
    return path


def test_the_campaign_of_the_repository_can_be_read():
    stages = campaigns.read_campaign(ROOT / "env/gpu/birds.yaml")
    assert [stage.profile for stage in stages] == ["birds-128", "birds-small"]
    first = [run.label for run in stages[0].runs()][:4]
    assert sorted(first) == ["CAT + SA", "RAT", "RAT + SA", "published RAT + SA"]  # seed 0 of every variant first
    assert {run.settings.model.image_size for run in stages[0].runs()} == {128}


def test_it_stops_goes_on_and_brings_home(campaign, tmp_path):
    stages = campaigns.read_campaign(campaign)
    left = campaigns.carry_out(stages, tmp_path / "out", minutes=0, progress=False)
    assert len(left) == 4 and not (tmp_path / "out").exists()
    assert campaigns.carry_out(stages, tmp_path / "out", progress=False) == []
    home = campaigns.collect(stages, tmp_path / "home", tmp_path / "out")
    runs = sorted(path.name for path in (home / "smoke").iterdir())
    assert len(runs) == 3  # CAT + SA and h = 0 are one run
    for run in runs:
        there = {path.name for path in (home / "smoke" / run).iterdir()}
        assert {"scores.json", "metrics.jsonl", "provenance.json", "checkpoint.json", "step-000003.png"} <= there
        assert "checkpoint.pt" not in there
        assert len(json.loads((home / "smoke" / run / "checkpoint.json").read_text())["sha256"]) == 64
    assert "commit" in json.loads((home / "machine.json").read_text())


@pytest.mark.parametrize(
    "text, said",
    [
        ("stages: []", "should hold `stages`"),
        ("stages: [{profile: smoke}]", "stage 1: should name profile and group"),
        ("stages: [{profile: smoke, group: ablatoin}]", "group='ablatoin': one of ablation"),
        (
            "stages: [{profile: smoke, group: sweep, variants: [h = 5]}]",
            "no variants h = 5; sweep has h = 0, h = 4, h = 8",
        ),
        ("stages: [{profile: smoke, group: sweep, steps: 3}]", "stage 1: should name profile and group"),
        ("stages: {", "not readable as YAML"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, text, said):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match="wrong.yaml") as caught:
        campaigns.read_campaign(path)
    assert said in str(caught.value)
    with pytest.raises(SettingsError, match="no such campaign file"):
        campaigns.read_campaign(tmp_path / "none.yaml")


# Runs side by side: processes that share a grid.


def test_processes_share_a_grid_and_each_run_is_made_once(tmp_path):
    settings = load_settings("smoke", {"experiments.steps": 3, "experiments.seeds": 2, "training.visits": [1, 2]})
    workspace = Workspace.of(settings, tmp_path, progress=False)
    assert grid.complete(workspace, "sweep", runner="library", jobs=2) == []
    runs = grid.unique(grid.plan(settings, "sweep"))
    assert len(runs) == 6 and all(run.complete(tmp_path) for run in runs)
    for run in runs:
        rows = [json.loads(line)["step"] for line in (run.folder(tmp_path) / "visits.jsonl").read_text().splitlines()]
        assert rows == [1, 2]
        assert json.loads((run.folder(tmp_path) / "provenance.json").read_text())["threads"] == 1
    assert grid.complete(workspace, "sweep", runner="library", jobs=2) == []
    with pytest.raises(SettingsError, match="2 runs side by side need the runner library"):
        grid.complete(workspace, "sweep", jobs=2)


def test_a_run_that_fails_in_another_process_is_an_error_here(tmp_path, capfd):
    settings = load_settings("smoke", {"experiments.steps": 3, "experiments.seeds": 1, "model.bridge_scale": 1e30})
    with pytest.raises(RunError, match="0 of 3 runs are done; what went wrong stands above; the same command goes on"):
        grid.complete(Workspace.of(settings, tmp_path, progress=False), "sweep", runner="library", jobs=2)
    assert "stopped at step 1" in capfd.readouterr().err


def test_a_run_that_another_process_writes_is_left_to_it(tmp_path):
    settings = load_settings("smoke", {"experiments.steps": 3, "experiments.seeds": 1})
    workspace = Workspace.of(settings, tmp_path, progress=False)
    first, *others = grid.unique(grid.plan(settings, "sweep"))
    with one_writer(first.folder(tmp_path)):
        left = grid.complete(workspace, "sweep", runner="library")
    assert left == [first] and all(run.complete(tmp_path) for run in others)
