"""The grid of runs: which variants, which are missing, how they are compared, and that a sitting can end."""

import json
import math
import time

import numpy as np
import pandas as pd
import pytest

from ratlip.errors import RunError
from ratlip.settings import load_settings
from ratlip.studies import compare, grid
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

    def test_the_published_arm_is_the_published_profile(self):
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
        with pytest.raises(ValueError, match="ablation, sweep, versus, not 'sweeep'"):
            grid.variants(settings, "sweeep")


def frame(**variants) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"label": label, "seed": seed, "score": value}
            for label, values in variants.items()
            for seed, value in enumerate(values)
        ]
    )


class TestDifferences:
    def test_the_interval_is_students(self):
        found = compare.paired(frame(a=[3.0, 5.0, 4.0], b=[1.0, 2.0, 3.0]), "a", "b", "score")
        # differences 2, 3, 1: mean 2, s = 1, t(0.975, 2) = 4.3027
        assert found.mean == pytest.approx(2) and found.high - found.mean == pytest.approx(4.3027 / math.sqrt(3), 1e-4)
        assert found.verdict == "undecided" and found.n == 3

    def test_verdicts_follow_the_direction_of_the_score(self):
        table = frame(a=[3.0, 3.1, 3.2], b=[1.0, 1.1, 1.21])
        assert compare.paired(table, "a", "b", "score").verdict == "supported"
        assert compare.paired(table, "b", "a", "score").verdict == "contradicted"
        assert compare.paired(table, "a", "b", "score", higher_is_better=False).verdict == "contradicted"

    def test_pairs_are_made_by_seed(self):
        table = frame(a=[1.0, 9.0], b=[0.0, 8.0])
        assert compare.paired(table.sample(frac=1, random_state=1), "a", "b", "score").verdict == "supported"

    def test_one_seed_decides_nothing(self):
        found = compare.paired(frame(a=[9.0], b=[1.0]), "a", "b", "score")
        assert found.verdict == "undecided" and found.low == -math.inf

    def test_a_seed_that_one_arm_lacks_is_left_out(self):
        assert compare.paired(frame(a=[1.0, 2.0, 3.0], b=[1.0, 2.0]), "a", "b", "score").n == 2

    def test_a_missing_arm_is_named(self):
        with pytest.raises(ValueError, match="no runs of 'c'; there are a, b"):
            compare.paired(frame(a=[1.0], b=[1.0]), "c", "a", "score")

    def test_several_scores_together(self):
        def said(*verdicts):
            return compare.verdict([compare.Difference(0, 0, 0, 2, each) for each in verdicts])

        assert said("undecided", "supported") == "supported"
        assert said("contradicted", "undecided") == "contradicted"
        assert said("supported", "contradicted") == said("undecided") == said() == "undecided"

    def test_the_training_clip_does_not_judge(self):
        columns = {
            "judge_all": [1.0],
            "frechet_distance": [2.0],
            "clip_similarity": [0.9],
            "independent_similarity": [np.nan],
        }
        assert list(compare.quality(pd.DataFrame(columns))) == ["judge_all", "frechet_distance"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    grid = {"experiments.seeds": 1, "experiments.hidden_sizes": [0, 4], "experiments.steps": 2}
    return Workspace.of(load_settings("smoke", grid), tmp_path_factory.mktemp("grid"), progress=False)


class TestRuns:
    def test_missing_runs_are_named_with_their_mend(self, workspace):
        with pytest.raises(RunError, match="2 of 2 runs are missing .*make reproduce PROFILE=smoke"):
            grid.results(workspace, "sweep")

    def test_the_grid_is_made_once_and_read(self, workspace):
        assert grid.complete(workspace, "sweep", door="library") == []
        before = {path: path.stat().st_mtime_ns for path in workspace.root.glob("runs/*/*")}
        start = time.monotonic()
        grid.complete(workspace, "sweep", door="library")
        assert time.monotonic() - start < 1
        assert before == {path: path.stat().st_mtime_ns for path in workspace.root.glob("runs/*/*")}
        table = grid.results(workspace, "sweep")
        assert list(table["label"]) == ["h = 0", "h = 4"] and list(table["steps"]) == [2, 2]
        assert table["frechet_distance"].gt(0).all() and table["real.frechet_distance"].gt(0).all()
        assert table["generator_parameters"].gt(1000).all() and table["peak_memory_mib"].gt(50).all()
        opened = grid.open_run(workspace, next(table.iloc[1:].itertuples()))
        assert opened.settings.model.hidden_size == 4
        assert len(grid.training_log(workspace, table["run"][0])) >= 1

    def test_a_sitting_that_ends_is_gone_on_with(self, workspace):
        done = grid.plan(workspace.settings, "sweep")[1]
        longer = grid.overridden(done.settings, {"training.steps": 6})
        run = grid.Experiment("h = 4", "sweep", 0, longer, {})
        folder = grid.execute(run, workspace, "library", end=time.monotonic())
        assert not run.complete(workspace.root) and (folder / "checkpoint.pt").is_file()
        grid.execute(run, workspace, "library")
        assert run.complete(workspace.root)
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)) and steps[-1] == 6

    def test_no_run_begins_when_the_time_is_used(self, workspace):
        left = grid.complete(workspace, "versus", door="library", minutes=0)
        assert {run.label for run in left} == {"corrected", "published", "published normalisation"}


@pytest.mark.parametrize(
    "values, digits",
    [
        ((0.26, 0.3), 2),
        ((8.06,), 1),
        ((-4.3, 0.1), 1),
        ((128.0, 3.0), 0),
        ((0.001,), 2),
        ((0.0,), 2),
        ((math.inf, 2.0), 1),
    ],
)
def test_two_digits_are_shown(values, digits):
    assert compare.decimals(*values) == digits
