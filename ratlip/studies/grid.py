"""The grid of runs behind notebooks 04 to 08: which variants and seeds, what is missing, what came out.

A run is `notebooks/03_train` executed by papermill with other parameters; its folder is named by its settings' hash,
so that a run which several notebooks read is made once. Nothing here trains: a run folder is complete, resumable, or
missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from unittest.mock import patch

import pandas as pd

from ratlip import published
from ratlip.cache import dotted
from ratlip.errors import BusyError, RatlipError, RunError, SettingsError
from ratlip.files import is_object, read_json, repository, write_text
from ratlip.progress import bar
from ratlip.report import notebooks, warm
from ratlip.settings import Settings, lay, load_settings, profile_names
from ratlip.settings.sections import Group
from ratlip.studies.compare import plain_label

if TYPE_CHECKING:
    from ratlip.training.generation import Run
    from ratlip.workspace import Workspace

GROUPS = get_args(Group)
CAT = {"model.conditioning": "cat"}
RAT = {"model.conditioning": "rat", "model.rat_scope": "generator"}
OFFICIAL = {"model.conditioning": "rat-official", "model.rat_scope": "mapper"}
ATTENTION, NONE, NORM = ({"model.attention": each} for each in ("shuffle", "none", "norm"))
SCALED = {"model.rat_input": "scaled"}
PUBLISHED = {**published.overrides("model", "clip", "training"), **ATTENTION}


@dataclass(frozen=True)
class Experiment:
    """One run of the grid: the variant's `label`, the `group` it was planned for, the `seed`, and all `settings`."""

    label: str
    group: str
    seed: int
    settings: Settings

    @property
    def name(self) -> str:
        """Of the run folder."""
        return self.settings.run_name

    def folder(self, root: Path) -> Path:
        """Its folder below a workspace's root."""
        return Path(root) / "runs" / self.name

    def complete(self, root: Path) -> bool:
        """Whether it is trained to its last step and scored, then and at its visits."""
        folder, visits = self.folder(root), self.settings.training.visits
        scored = is_object(folder / "provenance.json") and is_object(folder / "scores.json")
        return scored and (not visits or (folder / "visits.jsonl").is_file())

    def state(self, root: Path) -> str:
        """Whether it is "done", "begun" (goes on from a checkpoint) or "missing"."""
        begun = (self.folder(root) / "checkpoint.pt").is_file()
        return "done" if self.complete(root) else "begun" if begun else "missing"


def variants(settings: Settings, group: str) -> dict[str, dict[str, Any]]:
    """The variants of a group: label -> what each lays over the profile. Raises ValueError for another group.

    ablation: conditioning x attention, and RAT in the mapper alone (paper, ablations). sweep: the LSTM's hidden size h,
    0 meaning none (CAT). versus: the published form, all differences switched back at once, and one of them alone,
    against the corrected form. study: the variants of the plan's contrasts (`studies.study`), where the published form
    is trained on the same pairs and goes on in the same way as the others.
    """
    ours = {**RAT, **ATTENTION}
    if group == "ablation":
        return {
            "CAT": {**CAT, **NONE},
            "CAT + SA": {**CAT, **ATTENTION},
            "RAT": {**RAT, **NONE},
            "RAT + SA": ours,
            "RAT in the mapper + SA": {**ours, "model.rat_scope": "mapper"},
            "published RAT": {**OFFICIAL, **NONE},
            "published RAT + SA": {**OFFICIAL, **ATTENTION},
        }
    if group == "sweep":
        return {f"h = {h}": {**ours, "model.hidden_size": h} for h in settings.experiments.hidden_sizes}
    if group == "versus":
        normalisation = {**ours, "clip.normalisation": "published"}
        return {"corrected": ours, "published": PUBLISHED, "published normalisation": normalisation}
    if group == "study":
        same = {f"training.{name}": getattr(settings.training, name) for name in ("mismatch", "resume")}
        return {
            "CAT + SA": {**CAT, **ATTENTION},
            "RAT + SA": ours,
            "RAT scaled + SA": {**ours, **SCALED},
            "RAT scaled + norm": {**RAT, **NORM, **SCALED},
            "published RAT + SA": {**PUBLISHED, **same},
        }
    raise ValueError(f"group must be one of {', '.join(GROUPS)}, not {group!r}")


def plan(settings: Settings, *groups: str) -> list[Experiment]:
    """The runs of some groups (those of `experiments.groups` if none is named), seed by seed, variant by variant.

    Several groups may hold the same run; it is then in the list once for each of them.
    """
    e, runs = settings.experiments, []
    budget = {} if e.steps is None else {"training.steps": e.steps}
    for group in groups or e.groups:
        for seed in range(e.first_seed, e.first_seed + (e.versus_seeds if group == "versus" else e.seeds)):
            for label, overrides in variants(settings, group).items():
                own = overridden(settings, {**overrides, **budget, "seed": seed})
                runs.append(Experiment(label, group, seed, own))
    return runs


def unique(runs: Iterable[Experiment]) -> list[Experiment]:
    """The runs without those that another label has already named."""
    first: dict[str, Experiment] = {}
    for run in runs:
        first.setdefault(run.name, run)
    return list(first.values())


def overridden(settings: Settings, overrides: dict[str, Any]) -> Settings:
    """`settings` with dotted overrides laid over them, checked anew."""
    return Settings.model_validate(lay(settings.model_dump(mode="json"), overrides))


def parameters(run: Experiment, root: Path) -> dict[str, Any]:
    """What papermill gives to 03_train for this run: the profile, the seed, and all that differs from it."""
    profile = run.settings.profile
    if profile not in profile_names():  # a reader's own profile: its settings go along as a file
        profile = str(Path(root) / "profiles" / f"{run.name}.yaml")
        write_text(profile, run.settings.to_yaml())
    base, wanted = (dotted(s.model_dump(mode="json"), depth=1) for s in (load_settings(profile), run.settings))
    different = {key: value for key, value in wanted.items() if base.get(key) != value and key != "seed"}
    return {"profile": profile, "seed": run.seed, "settings": different}


def complete(
    workspace: Workspace, *groups: str, runner: str = "papermill", minutes: float | None = None, jobs: int = 1
) -> list[Experiment]:
    """Train and score what is missing of the groups' runs; returns at once where nothing is.

    `runner`: "papermill" executes 03_train for each run and keeps the notebook in the run's folder; "library" calls
    what that notebook calls. After `minutes` the run at work saves a checkpoint and no further one starts: the runs
    that are still missing are returned, for another call. `jobs`: so many runs side by side, of one thread each
    (library only).
    """
    return make(workspace, unique(plan(workspace.settings, *groups)), runner, end_after(minutes), jobs)


def make(workspace: Workspace, runs: list[Experiment], runner: str, end: float, jobs: int = 1) -> list[Experiment]:
    """`complete` for these runs, until `end`, a `time.monotonic()`."""
    if jobs == 1:
        return train_missing(workspace, runs, runner, end)
    if runner != "library":
        raise SettingsError(f"{jobs} runs side by side need the runner library, not {runner}")
    return _side_by_side(workspace, runs, jobs, end)


def _side_by_side(workspace: Workspace, runs: list[Experiment], jobs: int, end: float) -> list[Experiment]:
    """`train_missing` in so many processes, each of which takes the next run that no other one is at."""
    missing = [run for run in runs if not run.complete(workspace.root)]
    if not missing or time.monotonic() >= end:
        return missing
    make_shared(workspace)
    spawn, one = multiprocessing.get_context("spawn"), {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    quiet = dataclasses.replace(workspace, progress=False)
    with patch.dict(os.environ, one):
        lanes = [spawn.Process(target=_lane, args=(quiet, runs, end)) for _ in range(jobs)]
        for lane in lanes:
            lane.start()
    try:
        with bar(total=len(runs), desc="runs", unit="run", enabled=workspace.progress) as meter:
            while any(lane.is_alive() for lane in lanes):
                meter.update(sum(run.complete(workspace.root) for run in runs) - meter.n)
                next((lane for lane in lanes if lane.is_alive()), lanes[0]).join(5)
    finally:
        for lane in lanes:
            lane.terminate()
            lane.join()
    if any(lane.exitcode for lane in lanes):
        done = sum(run.complete(workspace.root) for run in runs)
        why = "what went wrong stands above"
        raise RunError(f"{workspace.root}: {done} of {len(runs)} runs are done; {why}; the same command goes on")
    return [run for run in runs if not run.complete(workspace.root)]


def _lane(workspace: Workspace, runs: list[Experiment], end: float) -> None:
    try:
        train_missing(workspace, runs, "library", end)
    except RatlipError as error:
        sys.exit(f"ratlip: {error}")


def make_shared(workspace: Workspace) -> None:
    """What all runs of a workspace read, where it is not there yet: data, embeddings, both CLIPs, the judge."""
    _ = workspace.prepared, workspace.sentences(), workspace.judge, workspace.independent


def end_after(minutes: float | None) -> float:
    """The `time.monotonic()` in so many minutes; infinite for None."""
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def train_missing(workspace: Workspace, runs: list[Experiment], runner: str, end: float = math.inf) -> list[Experiment]:
    """Train and score what is missing of `runs` until `end`, a `time.monotonic()`; what is missing then.

    A run that fails does not keep the next from being made. RunError names those that did, at the end.
    """
    missing = [run for run in runs if not run.complete(workspace.root)]
    if not missing or time.monotonic() >= end:
        return missing
    make_shared(workspace)
    failed: dict[str, RatlipError] = {}
    with warm.server() if runner == "papermill" else contextlib.nullcontext():
        for run in bar(missing, desc="runs", unit="run", enabled=workspace.progress):
            if time.monotonic() >= end:
                break
            if run.complete(workspace.root):  # by another process, in the meantime
                continue
            try:
                execute(run, workspace, runner, end)
            except BusyError:  # several processes share a grid: this run is another one's
                continue
            except RatlipError as error:
                failed[run.name] = error
    if failed:
        each = "\n".join(f"{name}: {error}" for name, error in failed.items())
        done = sum(run.complete(workspace.root) for run in missing)
        raise RunError(
            f"{len(failed)} of {len(missing)} runs failed, {done} are done; the same command goes on\n{each}"
        )
    return [run for run in runs if not run.complete(workspace.root)]


def execute(run: Experiment, workspace: Workspace, runner: str = "papermill", end: float = math.inf) -> Path:
    """Train and score one run; its folder. `end`: a `time.monotonic()` at which it saves a checkpoint and stops."""
    folder = run.folder(workspace.root)
    if runner == "library" or end < math.inf:  # a notebook cannot be stopped within its training
        own = workspace_of(run.settings, workspace.root, workspace.progress)
        shared = ["prepared", "judge", "independent"]
        if run.settings.clip.normalisation == workspace.settings.clip.normalisation:
            shared.append("clip")
        own.__dict__.update({name: getattr(workspace, name) for name in shared})
        own.train(end=end)
        if not is_object(folder / "provenance.json"):
            return folder
        if runner == "library":
            own.evaluate()
            return folder
    given = {**parameters(run, workspace.root), "outputs": str(workspace.root)}
    notebooks.execute(repository() / "notebooks/03_train.ipynb", folder / "03_train.ipynb", given, talk=False)
    return folder


def workspace_of(settings: Settings, root: Path, progress: bool) -> Workspace:
    """`Workspace.of`, imported late."""
    from ratlip.workspace import Workspace  # 2.4 s that the planning of `make reproduce` need not wait for

    return Workspace.of(settings, root, progress)


def results(workspace: Workspace, group: str) -> pd.DataFrame:
    """One row a run of the group: label, seed, run, hidden_size, steps, every number of its scores, its cost.

    Numbers of scores.json are named with dots ("judge.object", "real.frechet_distance"). RunError names the runs that
    are missing.
    """
    runs, profile = plan(workspace.settings, group), workspace.settings.profile
    if missing := [run.name for run in runs if not run.complete(workspace.root)]:
        names = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
        mend = f"`make reproduce PROFILE={profile}` makes them, or `ratlip grid --profile {profile} --run`"
        where = f"{workspace.root / 'runs'}: {len(missing)} of {len(runs)} runs are missing"
        raise RunError(f"{where} ({names}); {mend}")
    return found(workspace, group)


def found(workspace: Workspace, group: str) -> pd.DataFrame:
    """As `results`, of those runs of the group that are there; no row where none is."""
    order = list(variants(workspace.settings, group))
    runs = [run for run in plan(workspace.settings, group) if run.complete(workspace.root)]
    runs.sort(key=lambda run: (order.index(run.label), run.seed))
    return pd.DataFrame([_row(run, workspace.root) for run in runs])


def _row(run: Experiment, root: Path) -> dict[str, Any]:
    """A complete run as one flat dict: what it is, every number of its scores, and its cost."""
    provenance, scores = (read_json(run.folder(root) / name) for name in ("provenance.json", "scores.json"))
    about = {"label": run.label, "seed": run.seed, "run": run.name, "hidden_size": run.settings.model.hidden_size}
    about |= {"steps": provenance["steps"], "images": scores["images"]}
    numbers = {k: v for k, v in dotted(scores).items() if type(v) in (int, float) and k not in ("seed", "images")}
    cost = ("generator_parameters", "training_seconds", "peak_memory_mib")
    return about | numbers | {key: provenance.get(key) for key in cost}


def score_names(workspace: Workspace, group: str = "ablation") -> dict[str, str]:
    """What each score is called in print, with the extractor it depends on: column -> label.

    Without the fingerprint of a CLIP that was trained here, which is another one on another processor.
    """
    run = next(run for run in plan(workspace.settings, group) if run.complete(workspace.root))
    labels = read_json(run.folder(workspace.root) / "scores.json").get("labels", {})
    return {column: plain_label(label) for column, label in labels.items()}


def _folder(workspace: Workspace, run: Any) -> Path:
    name = run.name if isinstance(run, Experiment) else getattr(run, "run", run)
    return workspace.root / "runs" / str(name)


def open_run(workspace: Workspace, run: Any) -> Run:
    """The `generation.Run` of an Experiment, of a row of `results`, or of a run's name."""
    from ratlip.training.generation import Run  # brings torch, as the workspace does

    clip_folder = workspace.clip_folder if workspace.settings.clip.source == "train" else None
    return Run(_folder(workspace, run), clip_folder=clip_folder)


def training_log(workspace: Workspace, run: Any, file: str = "metrics.jsonl") -> pd.DataFrame:
    """The rows of a run's metrics.jsonl: step, seconds, and every term of both losses.

    With `file="visits.jsonl"`: step, and every score at the steps of `training.visits` ("judge_all", "judge.object").
    """
    from ratlip.training.log import read_rows  # brings torch, as the workspace does

    if not (rows := read_rows(path := _folder(workspace, run) / file)):
        raise RunError(f"{path}: missing or empty; delete the run's folder to train it anew")
    return pd.DataFrame(rows)
