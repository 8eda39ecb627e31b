"""The grid of runs behind notebooks 04 to 08: which variants and seeds, what is missing, what came out.

    python -m ratlip.studies.grid --profile demo            the plan, and what of it is done
    python -m ratlip.studies.grid --profile demo --run      trains what is missing, and goes on where it stopped
    python -m ratlip.studies.grid --profile birds-small --run --minutes 25     stops cleanly when the time is used

A run is `notebooks/03_train` executed by papermill with other parameters; its folder is named by its settings'
hash, so that a run which several notebooks read is made once. Nothing here trains: a run folder is complete,
resumable, or missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable

import pandas as pd

from ratlip.errors import RatlipError, RunError
from ratlip.files import outputs_folder, read_json, repository, write_text
from ratlip.progress import bar
from ratlip.settings import Settings, lay, load_settings, profile_names
from ratlip.studies.compare import plain

GROUPS = ("ablation", "sweep", "versus")
CAT = {"model.conditioning": "cat"}
RAT = {"model.conditioning": "rat", "model.rat_scope": "generator"}
OFFICIAL = {"model.conditioning": "rat-official", "model.rat_scope": "mapper"}
ATTENTION, NONE = {"model.attention": "shuffle"}, {"model.attention": "none"}
PUBLISHED = {
    **OFFICIAL,
    **ATTENTION,
    "clip.normalisation": "published",
    "model.unused_shortcuts": True,
    "training.real_resize": "nearest",
    "training.mismatch": "published",
    "training.resume": "published",
}


@dataclass(frozen=True)
class Experiment:
    """One run of the grid: the variant's `label`, the `seed`, all `settings`, and what sets the variant apart."""

    label: str
    group: str
    seed: int
    settings: Settings
    overrides: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.settings.run_name

    def folder(self, root: Path) -> Path:
        """Its place below a workspace's root."""
        return Path(root) / "runs" / self.name

    def complete(self, root: Path) -> bool:
        """Whether it is trained to its last step and scored."""
        return all((self.folder(root) / name).is_file() for name in ("provenance.json", "scores.json"))


# ------------------------------------------------------------------------------------------------ the plan


def variants(settings: Settings, group: str) -> dict[str, dict[str, Any]]:
    """The variants of a group: label -> what each lays over the profile. Raises ValueError for another group.

    ablation: conditioning x attention, and RAT in the mapper alone (paper, ablations). sweep: the LSTM's
    hidden size h, 0 meaning none (CAT). versus: the published form, all differences switched back at once,
    and one of them alone, against the corrected form.
    """
    if group == "ablation":
        return {
            "CAT": {**CAT, **NONE},
            "CAT + SA": {**CAT, **ATTENTION},
            "RAT": {**RAT, **NONE},
            "RAT + SA": {**RAT, **ATTENTION},
            "RAT in the mapper + SA": {**RAT, **ATTENTION, "model.rat_scope": "mapper"},
            "published RAT": {**OFFICIAL, **NONE},
            "published RAT + SA": {**OFFICIAL, **ATTENTION},
        }
    if group == "sweep":
        return {
            f"h = {h}": {**(RAT if h else CAT), **ATTENTION, "model.hidden_size": h}
            for h in settings.experiments.hidden_sizes
        }
    if group == "versus":
        return {
            "corrected": {**RAT, **ATTENTION},
            "published": PUBLISHED,
            "published normalisation": {**RAT, **ATTENTION, "clip.normalisation": "published"},
        }
    raise ValueError(f"group must be one of {', '.join(GROUPS)}, not {group!r}")


def plan(settings: Settings, *groups: str) -> list[Experiment]:
    """The runs of some groups (all of them if none is named), seed by seed, variant by variant.

    Several groups may hold the same run; it is then in the list once for each of them.
    """
    e, runs = settings.experiments, []
    for group in groups or GROUPS:
        seeds = e.versus_seeds if group == "versus" else e.seeds
        for seed in range(seeds):
            for label, overrides in variants(settings, group).items():
                laid = dict(overrides)
                if e.steps is not None:
                    laid["training.steps"] = e.steps
                runs.append(Experiment(label, group, seed, overridden(settings, {**laid, "seed": seed}), laid))
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
        profile = Path(root) / "depends" / "runs" / f"{run.name}.yaml"
        write_text(profile, run.settings.to_yaml())
    base, wanted = _flat(load_settings(profile)), _flat(run.settings)
    different = {key: value for key, value in wanted.items() if base.get(key) != value and key != "seed"}
    return {"profile": str(profile), "seed": run.seed, "settings": different}


def _flat(settings: Settings) -> dict[str, Any]:
    flat = {}
    for key, value in settings.model_dump(mode="json").items():
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat


# --------------------------------------------------------------------------------------------- doing it


def complete(workspace, *groups: str, door: str = "papermill", minutes: float | None = None) -> list[Experiment]:
    """Train and score what is missing of the groups' runs; returns at once where nothing is.

    `workspace`: a `Workspace`. `door`: "papermill" executes 03_train for each run and keeps the notebook in the
    run's folder; "library" calls what that notebook calls. After `minutes` the run at work saves a checkpoint
    and no further one starts: the runs that are still missing are returned, for another sitting.
    """
    runs = unique(plan(workspace.settings, *groups))
    return train_missing(workspace, runs, door, None if minutes is None else time.monotonic() + 60 * minutes)


def train_missing(
    workspace, runs: list[Experiment], door: str = "papermill", end: float | None = None, data: str | None = None
) -> list[Experiment]:
    """Train and score what is missing of `runs` until `end`, a `time.monotonic()`; what is missing then.

    `data`: the dataset's root, where the data are not prepared yet.
    """
    missing = [run for run in runs if not run.complete(workspace.root)]
    if not missing or (end is not None and time.monotonic() >= end):
        return missing
    if data:
        workspace.prepare(data)
    _ = (
        workspace.prepared,
        workspace.clip,
        workspace.judge,
        workspace.independent,
    )  # made once, before any run asks for them
    for run in bar(missing, desc="runs", unit="run", enabled=workspace.progress):
        if end is not None and time.monotonic() >= end:
            break
        execute(run, workspace, door, end)
    return [run for run in runs if not run.complete(workspace.root)]


def execute(run: Experiment, workspace, door: str = "papermill", end: float | None = None) -> Path:
    """Train and score one run; its folder. `end`: a `time.monotonic()` at which it saves and stops."""
    from ratlip.report import notebooks
    from ratlip.workspace import Workspace

    folder = run.folder(workspace.root)
    if door == "library" or end is not None:
        own = Workspace.of(run.settings, workspace.root, progress=workspace.progress)
        own.__dict__.update({name: getattr(workspace, name) for name in ("prepared", "judge", "independent")})
        if own.settings.clip.normalisation == workspace.settings.clip.normalisation:
            own.__dict__["clip"] = workspace.clip
        own.train(end=end)
        if not (folder / "provenance.json").is_file():
            return folder
        if door == "library":
            own.evaluate()
            return folder
    given = {**parameters(run, workspace.root), "outputs": str(workspace.root)}
    source = repository() / "notebooks" / "03_train.ipynb"
    notebooks.execute(source, folder / "03_train.ipynb", given, talk=False)
    return folder


# ------------------------------------------------------------------------------------------ what came out


def results(workspace, group: str) -> pd.DataFrame:
    """One row a run of the group: label, seed, run, hidden_size, steps, every number of its scores, its cost.

    Numbers of scores.json are named with dots ("judge.object", "real.frechet_distance"). RunError names the
    runs that are missing.
    """
    runs = plan(workspace.settings, group)
    missing = [run for run in runs if not run.complete(workspace.root)]
    if missing:
        names = ", ".join(run.name for run in missing[:4]) + (" ..." if len(missing) > 4 else "")
        raise RunError(
            f"{workspace.root / 'runs'}: {len(missing)} of {len(runs)} runs are missing ({names}); "
            f"`make reproduce PROFILE={workspace.settings.profile}` makes them, or "
            f"`python -m ratlip.studies.grid --profile {workspace.settings.profile} --run`"
        )
    return found(workspace, group)


def found(workspace, group: str) -> pd.DataFrame:
    """As `results`, of those runs of the group that are there; no row where none is."""
    order = list(variants(workspace.settings, group))
    runs = [run for run in plan(workspace.settings, group) if run.complete(workspace.root)]
    runs.sort(key=lambda run: (order.index(run.label), run.seed))
    return pd.DataFrame([row(run, workspace.root) for run in runs])


def row(run: Experiment, root: Path) -> dict[str, Any]:
    """A complete run as one flat dict: what it is, every number of its scores, and its cost."""
    folder = run.folder(root)
    provenance, scores = read_json(folder / "provenance.json"), read_json(folder / "scores.json")
    numbers = {key: value for key, value in _numbers(scores).items() if key not in ("seed", "images")}
    return {
        "label": run.label,
        "seed": run.seed,
        "run": run.name,
        "hidden_size": run.settings.model.hidden_size,
        "steps": provenance["steps"],
        "images": scores["images"],
        **numbers,
        "generator_parameters": provenance.get("generator_parameters"),
        "training_seconds": provenance["training_seconds"],
        "peak_memory_mib": provenance.get("peak_memory_mib"),
    }


def _numbers(content: dict, prefix: str = "") -> dict[str, float]:
    flat = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


def score_names(workspace, group: str = "ablation") -> dict[str, str]:
    """What each score is called in print, with the extractor it depends on: column -> label.

    Without the fingerprint of a CLIP that was trained here, which is another one on another processor.
    """
    run = next(run for run in plan(workspace.settings, group) if run.complete(workspace.root))
    labels = read_json(run.folder(workspace.root) / "scores.json").get("labels", {})
    return {column: plain(label) for column, label in labels.items()}


def open_run(workspace, run):
    """The `generation.Run` of an Experiment, of a row of `results`, or of a run's name."""
    from ratlip.training import generation

    name = getattr(run, "name", None) if isinstance(run, Experiment) else getattr(run, "run", run)
    clip_folder = workspace.clip_folder if workspace.settings.clip.source == "train" else None
    return generation.Run(workspace.root / "runs" / str(name), clip_folder=clip_folder)


def training_log(workspace, run) -> pd.DataFrame:
    """The rows of a run's metrics.jsonl: step, seconds, and every term of both losses."""
    name = run.name if isinstance(run, Experiment) else getattr(run, "run", run)
    lines = (workspace.root / "runs" / str(name) / "metrics.jsonl").read_text().splitlines()
    return pd.DataFrame([json.loads(line) for line in lines])


# ------------------------------------------------------------------------------------------------ by hand


def main() -> None:
    """Entry point of `python -m ratlip.studies.grid`."""
    from ratlip.settings import read_overrides
    from ratlip.workspace import Workspace

    parser = argparse.ArgumentParser(
        prog="python -m ratlip.studies.grid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", "-p", default="demo")
    parser.add_argument("--data", help="root of the dataset (not for demo, smoke)")
    parser.add_argument("--out", help="where everything goes [outputs/<profile>]")
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--set", "-s", action="append", metavar="KEY=VALUE", default=[])
    parser.add_argument("--run", action="store_true", help="train what is missing")
    parser.add_argument("--minutes", type=float, help="stop cleanly after so many minutes")
    parser.add_argument("--door", choices=("papermill", "library"), default="papermill")
    chosen = parser.parse_args()
    try:
        settings = load_settings(chosen.profile, read_overrides(chosen.set))
        workspace = Workspace.of(settings, outputs_folder(settings.profile, chosen.out))
        if chosen.run:
            workspace.prepare(chosen.data)
            complete(workspace, *chosen.group, door=chosen.door, minutes=chosen.minutes)
        runs = unique(plan(settings, *chosen.group))
        for run in runs:
            state = (
                "done"
                if run.complete(workspace.root)
                else "begun"
                if (run.folder(workspace.root) / "checkpoint.pt").is_file()
                else "missing"
            )
            print(f"{state:<8} {run.label:<24} seed {run.seed}  {run.name}")
        left = sum(not run.complete(workspace.root) for run in runs)
        print(f"{len(runs) - left} of {len(runs)} runs done")
    except RatlipError as error:
        sys.exit(f"ratlip: {error}")


if __name__ == "__main__":
    main()
