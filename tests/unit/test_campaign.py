"""A campaign stops when its time is used, goes on where it stopped, and brings its results home."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ratlip.errors import SettingsError
from ratlip.studies import campaign

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
def file(tmp_path):
    path = tmp_path / "campaign.yaml"
    path.write_text(STAGES)
    return path


def test_the_campaign_of_the_repository_can_be_read():
    stages = campaign.read_campaign(ROOT / "env/gpu/birds.yaml")
    assert [stage.profile for stage in stages] == ["birds-128", "birds-small"]
    first = [run.label for run in stages[0].runs()][:4]
    assert sorted(first) == ["CAT + SA", "RAT", "RAT + SA", "published RAT + SA"]  # seed 0 of every variant first
    assert {run.settings.model.image_size for run in stages[0].runs()} == {128}


def test_it_stops_goes_on_and_brings_home(file, tmp_path):
    stages = campaign.read_campaign(file)
    left = campaign.carry_out(stages, tmp_path / "out", minutes=0, progress=False)
    assert len(left) == 4 and not (tmp_path / "out").exists()
    assert campaign.carry_out(stages, tmp_path / "out", progress=False) == []
    home = campaign.collect(stages, tmp_path / "home", tmp_path / "out")
    runs = sorted(path.name for path in (home / "smoke").iterdir())
    assert len(runs) == 3  # CAT + SA and h = 0 are one run
    for run in runs:
        there = {path.name for path in (home / "smoke" / run).iterdir()}
        assert {"scores.json", "metrics.jsonl", "provenance.json", "checkpoint.json", "step-000003.png"} <= there
        assert "checkpoint.pt" not in there
        assert len(json.loads((home / "smoke" / run / "checkpoint.json").read_text())["sha256"]) == 64
    assert "commit" in json.loads((home / "machine.json").read_text())


def test_the_command_says_what_is_left(file, tmp_path):
    command = [sys.executable, "-m", "ratlip.studies.campaign", file, "--minutes", "0", "--outputs", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == campaign.UNFINISHED and "0 of 4 runs done" in done.stdout
    assert "next: CAT + SA, seed 0" in done.stdout


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
        campaign.read_campaign(path)
    assert said in str(caught.value)
    with pytest.raises(SettingsError, match="no such campaign file"):
        campaign.read_campaign(tmp_path / "none.yaml")
