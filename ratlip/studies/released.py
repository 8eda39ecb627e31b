"""The raw results of the study, as they are released: small tables that need no run, no CLIP and no training to read.

    <report>/runs/  runs.csv (a row a run)  visits.csv (its scores at each visit and at the end)  losses.csv
                    settings/<run>.yaml  provenance.json  real.json (real images and chance)  plan.json

`release` copies what finished runs found, and refuses what nobody could make again: a run from a tree with uncommitted
changes, or runs of different commits. `read` gives it back, and all tables, figures and answers are made from that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from ratlip.cache import dotted
from ratlip.errors import RunError
from ratlip.files import read_json, write_json, write_text
from ratlip.progress import bar
from ratlip.studies import grid
from ratlip.training.log import VISITS, read_rows

if TYPE_CHECKING:
    from ratlip.workspace import Workspace

TABLES = ("runs", "visits", "losses")
ABOUT = ["label", "seed", "run"]
PROVENANCE = ("training_seconds", "peak_memory_mib", "generator_parameters", "state_scale", "commit", "processor")
NOT_SCORES = ("seed", "seconds_per_image", "real.", "chance.", "images")


@dataclass(frozen=True)
class Released:
    """What was released: a row a run, a row a visit, a row a logged step; scores of real images; the plan's runs."""

    runs: pd.DataFrame
    visits: pd.DataFrame
    losses: pd.DataFrame
    real: dict[str, Any]
    plan: dict[str, Any]  # "labels", "seeds", "visits": what a complete study holds

    @property
    def complete(self) -> bool:
        """Whether every run of the plan is there."""
        return len(self.runs) == len(self.plan["labels"]) * len(self.plan["seeds"])

    @property
    def seeds(self) -> list[int]:
        """Seeds of which all variants are there."""
        counts = self.runs.groupby("seed")["label"].nunique()
        return [int(seed) for seed in counts.index[counts == len(self.plan["labels"])]]


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The numbers of a run's scores by their dotted names, without those of real images."""
    flat = {k: v for k, v in dotted(scores).items() if type(v) in (int, float)}
    return {name: value for name, value in flat.items() if not name.startswith(NOT_SCORES)}


def release(workspace: Workspace, folder: str | Path, group: str = "study") -> Path:
    """Write the raw results of the complete runs of `group` into `folder`/runs; RunError where there is none.

    Runs that were released before and are not at hand stay as they are: a study may be trained in sittings, and on a
    machine that keeps nothing. Also RunError where a run was made from uncommitted changes, or runs from more than one
    commit: such numbers cannot be made again.
    """
    plan = grid.plan(workspace.settings, group)
    runs = [run for run in plan if run.complete(workspace.root)]
    if not runs:
        command = f"ratlip grid --profile {workspace.settings.profile} --group {group} --run"
        raise RunError(f"{workspace.root / 'runs'}: none of the {len(plan)} runs is complete; `{command}` makes them")
    target = Path(folder) / "runs"
    before = read(folder) if (target / "runs.csv").is_file() else None
    names = {run.name: number for number, run in enumerate(plan)}
    there = set(before.runs["run"]) & names.keys() - {run.name for run in runs} if before else set()
    kept = (
        {name: each for name, each in read_json(target / "provenance.json").items() if name in there} if there else {}
    )
    kept |= {run.name: read_json(run.folder(workspace.root) / "provenance.json") for run in runs}
    if dirty := [name for name, each in kept.items() if each["uncommitted_changes"] is not False]:
        mend = "delete it, commit, and train it again"
        raise RunError(f"{workspace.root / 'runs' / dirty[0]}: trained with uncommitted changes; {mend}")
    if len(commits := sorted({each["commit"] for each in kept.values()})) > 1:
        raise RunError(f"{workspace.root / 'runs'}: the runs come from several commits ({', '.join(commits)})")
    about, visits, losses = [], [], []
    for run in runs:
        home, own = run.folder(workspace.root), {"label": run.label, "seed": run.seed, "run": run.name}
        scores = read_json(home / "scores.json")
        about.append(own | {name: kept[run.name].get(name) for name in PROVENANCE} | {"images": scores["images"]})
        rows = read_rows(home / VISITS)
        end = {"step": kept[run.name]["steps"], **numbers(scores)}
        visits += [own | row for row in [*(row for row in rows if row["step"] < end["step"]), end]]
        losses += [own | row for row in read_rows(home / "metrics.jsonl")]
        write_text(target / "settings" / f"{run.name}.yaml", (home / "config.yaml").read_text("utf-8"))
    for name, each in {"runs": about, "visits": visits, "losses": losses}.items():
        table = pd.DataFrame(each)
        if before is not None and there:
            old = getattr(before, name)
            table = pd.concat([old[old["run"].isin(there)], table], ignore_index=True)
        table = table.sort_values("run", key=lambda column: column.map(names), kind="stable")
        write_text(target / f"{name}.csv", table.to_csv(index=False))
    scores = read_json(runs[0].folder(workspace.root) / "scores.json")
    write_json(target / "real.json", {name: scores[name] for name in ("real", "chance", "labels") if name in scores})
    write_json(target / "provenance.json", kept)
    last = workspace.settings.experiments.steps or workspace.settings.training.steps
    labels, seeds = (list(dict.fromkeys(getattr(run, name) for run in plan)) for name in ("label", "seed"))
    steps = [step for step in workspace.settings.training.visits if last is None or step < last]
    write_json(target / "plan.json", {"labels": labels, "seeds": seeds, "visits": [*steps, last]})
    return target


def probe(workspace: Workspace, folder: str | Path, group: str = "study") -> Path:
    """Write what each layer of the complete runs knows into `folder`/runs: probes.csv, words.csv (`studies.probes`).

    Runs whose rows are there already are not read again.
    """
    from ratlip.data.generated import generated_set  # these bring scikit-learn, which re-analysis need not wait for
    from ratlip.studies import probes

    target, before = Path(folder) / "runs", read_probes(folder)
    tables = {name: [before[name]] if name in before else [] for name in ("probes", "words")}
    done = set(before["words"]["run"]) if "words" in before else set()
    runs = [
        run for run in grid.plan(workspace.settings, group) if run.complete(workspace.root) and run.name not in done
    ]
    made, test = generated_set(workspace.prepared), workspace.prepared.test
    for each in bar(runs, desc="probes", unit="run", enabled=workspace.progress):
        run, own = grid.open_run(workspace, each), {"label": each.label, "seed": each.seed, "run": each.name}
        tables["probes"].append(probes.readable(run, workspace.prepared, len(test)).assign(**own))
        tables["words"].append(probes.word_effect(run, made, (test.attributes or [])[:128]).assign(**own))
    for name, parts in tables.items():
        write_text(target / f"{name}.csv", pd.concat(parts).to_csv(index=False, float_format="%.5g"))
    return target


def read_probes(folder: str | Path) -> dict[str, pd.DataFrame]:
    """ "probes" and "words" as `probe` has written them; nothing where it has not."""
    paths = {name: Path(folder) / "runs" / f"{name}.csv" for name in ("probes", "words")}
    return {name: pd.read_csv(path) for name, path in paths.items() if path.is_file()}


def read(folder: str | Path) -> Released:
    """What was released into `folder`/runs. RunError names a file that is missing or not readable."""
    home = Path(folder) / "runs"
    try:
        runs, visits, losses = (pd.read_csv(home / f"{name}.csv") for name in TABLES)
        found = Released(runs, visits, losses, read_json(home / "real.json"), read_json(home / "plan.json"))
    except (OSError, ValueError) as problem:
        raise RunError(f"{home}: no released results, or damaged ones ({problem})") from problem
    for name, table in {"runs": runs, "visits": visits, "losses": losses}.items():
        if lost := [column for column in ABOUT if column not in table]:
            raise RunError(f"{home / name}.csv: has no column {', '.join(lost)}")
    return found


def collected(folder: str | Path, found: Released) -> pd.DataFrame:
    """The runs of `folder`/support (of `ratlip grid reports/study/support.yaml --collect`): one row a visit.

    Columns: label, seed, run, `changed` (the settings that differ from the study's run of this label and seed), step
    and every score. Empty where there are none. RunError for a run that has no fellow in the study.
    """
    home, rows = Path(folder) / "support", []
    runs = {(label, seed): run for label, seed, run in found.runs[ABOUT].itertuples(index=False)}
    for path in sorted(home.glob("*/*/scores.json")):
        scores, config = read_json(path), yaml.safe_load((path.parent / "config.yaml").read_text("utf-8"))
        label, seed = read_json(path.parent / "checkpoint.json")["label"], config["seed"]
        if (label, seed) not in runs:
            raise RunError(f"{path.parent}: the study has no run of {label!r} with seed {seed} to hold it against")
        base = yaml.safe_load((Path(folder) / "runs/settings" / f"{runs[label, seed]}.yaml").read_text("utf-8"))
        mine, other = (dotted({part: each[part] for part in ("clip", "model", "training")}) for each in (config, base))
        differ = [name for name in mine if mine[name] != other.get(name) and not name.startswith("training.visits")]
        own = {"label": label, "seed": seed, "run": path.parent.name}
        own["changed"] = ", ".join(f"{name.partition('.')[2]} {mine[name]}" for name in differ)
        steps = read_json(path.parent / "provenance.json")["steps"]
        visits = [row for row in read_rows(path.parent / VISITS) if row["step"] < steps]
        rows += [own | row for row in [*visits, {"step": steps, **numbers(scores)}]]
    return pd.DataFrame(rows)


def compare_again(workspace: Workspace, folder: str | Path, label: str, seed: int, train: bool = True) -> pd.DataFrame:
    """Train one released run anew (or find it) and hold every score of every visit against the released one.

    One row a visit and score: step, score, released, again, `state`: "equal" (to the last digit that is kept), "inside"
    (the range of the released seeds of this variant) or "outside". Without `train`, no row for a run that is not at
    hand. RunError for a run that was not released.
    """
    found = read(folder)
    kept = found.visits[(found.visits["label"] == label) & (found.visits["seed"] == seed)]
    runs = [run for run in grid.plan(workspace.settings, "study") if (run.label, run.seed) == (label, seed)]
    if kept.empty or not runs:
        there = ", ".join(f"{name}:{number}" for name, number in found.runs[["label", "seed"]].itertuples(index=False))
        raise RunError(f"{folder}: holds no run {label}:{seed}; there are {there}")
    if runs[0].name != kept["run"].iloc[0]:
        why = "the profile's settings are not those of the release"
        raise RunError(f"{folder}: {label}, seed {seed} is the run {kept['run'].iloc[0]}, here {runs[0].name}: {why}")
    if train:
        grid.train_missing(workspace, runs, "library")
    elif not runs[0].complete(workspace.root):
        return pd.DataFrame()
    home, rows = runs[0].folder(workspace.root), []
    again = [row for row in read_rows(home / VISITS) if row["step"] < kept["step"].max()]
    again.append({"step": int(kept["step"].max()), **numbers(read_json(home / "scores.json"))})
    seeds = found.visits[found.visits["label"] == label]
    for row, before in zip(again, kept.sort_values("step").to_dict("records"), strict=True):
        others = seeds[seeds["step"] == row["step"]]
        for score in [name for name in row if name in others and name != "step"]:
            low, high = others[score].min(), others[score].max()
            state = "equal" if row[score] == before[score] else "inside" if low <= row[score] <= high else "outside"
            rows.append(dict(step=row["step"], score=score, released=before[score], again=row[score], state=state))
    return pd.DataFrame(rows)
