"""A campaign: a YAML file that names parts of the grid, for a machine that is lent for minutes."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ratlip.cache import file_digest
from ratlip.errors import SettingsError
from ratlip.files import outputs_folder, write_json
from ratlip.settings import load_settings
from ratlip.studies import grid

if TYPE_CHECKING:
    from ratlip.workspace import Workspace

COLLECTED = ("config.yaml", "identity.json", "metrics.jsonl", "visits.jsonl", "provenance.json", "scores.json")


@dataclass(frozen=True)
class Stage:
    """One line of a campaign: a profile, a group, optionally some `variants` of it, `settings` over the profile."""

    profile: str
    group: str
    variants: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def runs(self) -> list[grid.Experiment]:
        """Its runs, seed by seed."""
        every = grid.plan(load_settings(self.profile, self.settings), self.group)
        return [run for run in every if not self.variants or run.label in self.variants]

    def workspace(self, root: Path | None = None, progress: bool = True) -> Workspace:
        """The workspace of its profile: in the folder `root`, or in outputs/ of the repository."""
        s = load_settings(self.profile, self.settings)
        return grid.workspace_of(s, Path(root) / s.profile if root else outputs_folder(s.profile), progress)


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
    return [_stage(f"{path}: stage {number}", each) for number, each in enumerate(stages, start=1)]


def _stage(where: str, content: Any) -> Stage:
    known = {"profile", "group", "variants", "settings"}
    if not isinstance(content, dict) or not {"profile", "group"} <= set(content) <= known:
        raise SettingsError(f"{where}: should name profile and group, and may name variants and settings")
    profile, group = content["profile"], content["group"]
    if group not in grid.GROUPS:
        raise SettingsError(f"{where}: group={group!r}: one of {', '.join(grid.GROUPS)}")
    stage = Stage(profile, group, tuple(content.get("variants") or ()), dict(content.get("settings") or {}))
    there = grid.variants(load_settings(profile, stage.settings), group)
    if unknown := [variant for variant in stage.variants if variant not in there]:
        raise SettingsError(f"{where}: no variants {', '.join(unknown)}; {group} has {', '.join(there)}")
    return stage


def carry_out(
    stages: list[Stage],
    root: Path | None = None,
    data: str | Path | None = None,
    minutes: float | None = None,
    progress: bool = True,
    jobs: int = 1,
) -> list[grid.Experiment]:
    """Train and score what is missing, stage by stage; the runs that are still missing when the time is used.

    `root`: a folder for all profiles' outputs; outputs/ in the repository where None. `jobs`: see `grid.complete`.
    """
    end, left = grid.end_after(minutes), []
    for stage in stages:
        workspace = stage.workspace(root, progress)
        if data and time.monotonic() < end:
            workspace.prepare(data)
        left += grid.make(workspace, stage.runs(), "library", end, jobs)
    return left


def collect(stages: list[Stage], folder: str | Path, root: Path | None = None, weights: bool = False) -> Path:
    """Copy what the runs found into `folder`/<profile>/<run>/, and the machine's description beside them.

    Scores, losses, settings, the last sample grid (generated images alone) and the checkpoint's SHA-256; the checkpoint
    itself only with `weights`.
    """
    from ratlip.provenance import describe  # brings torch, as the workspace does

    folder = Path(folder)
    for stage in stages:
        home = stage.workspace(root).root
        for run in stage.runs():
            source, target = run.folder(home), folder / home.name / run.name
            checkpoint = source / "checkpoint.pt"
            if not checkpoint.is_file():
                continue
            target.mkdir(parents=True, exist_ok=True)
            wanted = [path for name in COLLECTED if (path := source / name).is_file()]
            wanted += [*sorted((source / "samples").glob("step-*.png"))[-1:], *([checkpoint] if weights else [])]
            for path in wanted:
                shutil.copy(path, target / path.name)
            about = {"label": run.label, "bytes": checkpoint.stat().st_size, "sha256": file_digest(checkpoint)}
            write_json(target / "checkpoint.json", about)
    write_json(folder / "machine.json", describe())
    return folder
