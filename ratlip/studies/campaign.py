"""Parts of the grid on a machine that is lent for minutes: one command, which stops and goes on later.

    python -m ratlip.studies.campaign env/gpu/birds.yaml --data data/birds --minutes 25 --collect results

A campaign is a YAML file with `stages`; each names a profile, a group of `ratlip.studies.grid`, and optionally
`variants` of it and `settings` laid over the profile. When the time is used, the run at work saves its
checkpoint. The command then says what is left, and exits with 0 where nothing is and with 3 where something
is.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ratlip.errors import RatlipError, SettingsError
from ratlip.files import outputs_folder, write_json
from ratlip.provenance import describe
from ratlip.settings import load_settings
from ratlip.studies import grid

UNFINISHED = 3
BRING = ("config.yaml", "identity.json", "metrics.jsonl", "provenance.json", "scores.json")


@dataclass(frozen=True)
class Stage:
    """One line of a campaign."""

    profile: str
    group: str
    variants: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def runs(self) -> list[grid.Experiment]:
        """Its runs, seed by seed."""
        settings = load_settings(self.profile, self.settings)
        every = grid.plan(settings, self.group)
        return [run for run in every if not self.variants or run.label in self.variants]


def read_campaign(path: str | Path) -> list[Stage]:
    """The stages of a campaign file. SettingsError names the file, the stage and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise SettingsError(f"{path}: there is no such campaign file; env/gpu/birds.yaml is one")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not readable as YAML: {error}") from None
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, list) or not stages:
        raise SettingsError(f"{path}: should hold `stages`, a list of one part of the grid each")
    return [_stage(path, number, each) for number, each in enumerate(stages, start=1)]


def _stage(path: Path, number: int, content: Any) -> Stage:
    where, known = f"{path}: stage {number}", ("profile", "group", "variants", "settings")
    if not isinstance(content, dict) or not {"profile", "group"} <= set(content) <= set(known):
        raise SettingsError(f"{where}: should name profile and group, and may name variants and settings")
    if content["group"] not in grid.GROUPS:
        raise SettingsError(f"{where}: group={content['group']!r}: one of {', '.join(grid.GROUPS)}")
    stage = Stage(
        content["profile"], content["group"], tuple(content.get("variants") or ()), dict(content.get("settings") or {})
    )
    variants = grid.variants(load_settings(stage.profile, stage.settings), stage.group)
    unknown = [variant for variant in stage.variants if variant not in variants]
    if unknown:
        raise SettingsError(f"{where}: no variants {', '.join(unknown)}; {stage.group} has {', '.join(variants)}")
    return stage


def carry_out(
    stages: list[Stage],
    root: Path | None = None,
    data: str | None = None,
    minutes: float | None = None,
    progress: bool = True,
) -> list[grid.Experiment]:
    """Train and score what is missing, stage by stage; the runs that are still missing when the time is used.

    `root`: a folder for all profiles' outputs; `outputs` in the repository where None.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    left = []
    for stage in stages:
        left += grid.train_missing(stage_workspace(stage, root, progress), stage.runs(), "library", end, data)
    return left


def stage_workspace(stage: Stage, root: Path | None = None, progress: bool = True):
    """The `Workspace` of a stage's profile."""
    from ratlip.workspace import Workspace

    settings = load_settings(stage.profile, stage.settings)
    home = Path(root) / settings.profile if root else outputs_folder(settings.profile)
    return Workspace.of(settings, home, progress)


def collect(stages: list[Stage], folder: str | Path, root: Path | None = None, weights: bool = False) -> Path:
    """Copy what the runs found into `folder`/<profile>/<run>/, and the machine's description beside them.

    Scores, losses, settings, the last sample grid (generated images alone) and the checkpoint's SHA-256; the
    checkpoint itself only with `weights`.
    """
    folder = Path(folder)
    for stage in stages:
        workspace = stage_workspace(stage, root, progress=False)
        for run in stage.runs():
            source, target = run.folder(workspace.root), folder / workspace.settings.profile / run.name
            if not (source / "checkpoint.pt").is_file():
                continue
            target.mkdir(parents=True, exist_ok=True)
            grids = sorted((source / "samples").glob("step-*.png"))[-1:]
            for path in [*(source / name for name in BRING if (source / name).is_file()), *grids]:
                shutil.copy(path, target / path.name)
            checkpoint = source / "checkpoint.pt"
            write_json(
                target / "checkpoint.json",
                {"label": run.label, "bytes": checkpoint.stat().st_size, "sha256": _sha256(checkpoint)},
            )
            if weights:
                shutil.copy(checkpoint, target / checkpoint.name)
    write_json(folder / "machine.json", describe())
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def main() -> None:
    """Entry point of `python -m ratlip.studies.campaign`."""
    parser = argparse.ArgumentParser(
        prog="python -m ratlip.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaign", type=Path, help="a file such as env/gpu/birds.yaml")
    parser.add_argument("--data", help="root of the dataset")
    parser.add_argument("--minutes", type=float, help="stop cleanly after so many minutes")
    parser.add_argument("--outputs", type=Path, help="where everything goes [outputs in the repository]")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="copy scores, losses and grids there")
    parser.add_argument("--weights", action="store_true", help="collect the checkpoints too")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    chosen = parser.parse_args()
    try:
        stages = read_campaign(chosen.campaign)
        left = carry_out(stages, chosen.outputs, chosen.data, chosen.minutes, not chosen.quiet)
        if chosen.collect:
            print(f"collected in {collect(stages, chosen.collect, chosen.outputs, chosen.weights)}")
    except RatlipError as error:
        sys.exit(f"ratlip: {error}")
    total = sum(len(stage.runs()) for stage in stages)
    print(f"{total - len(left)} of {total} runs done")
    if left:
        print(f"next: {left[0].label}, seed {left[0].seed}; the same command goes on")
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    main()
