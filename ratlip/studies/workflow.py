"""What `make reproduce` runs: every notebook and every run with what its result depends on, for the Snakefile.

A target's dependencies are written to outputs/<profile>/depends/<target>.json, and only when they change, so
that the file's time of change says whether the target must be made again. It lies in outputs/, hence a fresh
clone, whose reports/ came with it, makes everything.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ratlip.errors import SettingsError
from ratlip.files import outputs_folder, repository, shown, write_text
from ratlip.settings import Settings, load_settings
from ratlip.studies import grid

GROUPS_OF = {
    "04_ablation": ("ablation",),
    "05_hidden_size_sweep": ("sweep",),
    "06_grad_cam": ("sweep",),
    "07_paper_versus_code": ("ablation", "versus"),
    "08_figures_and_tables": grid.GROUPS,
}


@dataclass(frozen=True)
class Plan:
    """Settings, and for each notebook and each run of the grid the file of what it depends on."""

    settings: Settings
    notebooks: dict[str, Path]
    runs: dict[str, Path] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)  # of papermill, for the shell
    groups: dict[str, list[str]] = field(default_factory=dict)  # notebook -> names of the runs that it reads

    def executed(self, run: str) -> str:
        """The executed notebook of a run, from the repository's root where it lies below it."""
        return shown(outputs_folder(self.settings.profile) / "runs" / run / "03_train.ipynb")

    def targets(self, report: str) -> dict[str, str]:
        """Each notebook's executed form in a report folder."""
        return {name: f"{report}/notebooks/{name}.ipynb" for name in self.notebooks}


def plan(profile: str, data: str | None = None) -> Plan:
    """The plan of a profile. SettingsError for a profile that needs data and was given none."""
    s = load_settings(profile)
    folder = outputs_folder(s.profile)
    _check_data(s, profile, data, folder)
    runs = grid.unique(grid.plan(s))
    groups = {name: [run.name for run in grid.unique(grid.plan(s, *groups))] for name, groups in GROUPS_OF.items()}
    depends = folder / "depends"
    groups["03_train"] = [s.run_name] if s.run_name in {run.name for run in runs} else []  # not made twice
    code = _digest("03_train", code_only=True)
    files = {
        run.name: _noted(
            depends / "runs" / f"{run.name}.json", {"run": run.settings.run_hash, "scores": scoring(s), "code": code}
        )
        for run in runs
    }
    laid = {run.name: _for_shell(grid.parameters(run, folder)) for run in runs}
    notebooks = {
        name: _noted(depends / f"{name}.json", {**content, "notebook": _digest(name)})
        for name, content in contents(s, groups).items()
    }
    return Plan(s, notebooks, files, laid, groups)


def scoring(s: Settings) -> dict[str, Any]:
    """The settings that decide a run's scores, but not its weights."""
    e = s.evaluation.model_dump(mode="json", exclude={"study", "grid_captions", "grid_images"})
    return {**e, "independent": s.independent_hash}


def contents(s: Settings, groups: dict[str, list[str]]) -> dict[str, dict]:
    """What each notebook's result depends on, besides its text."""
    e = s.evaluation.model_dump(mode="json")
    return {
        "01_prepare_data": {"data": s.data.model_dump(mode="json"), "image_size": s.model.image_size},
        "02_prepare_clip": {
            "clip": s.clip_hash,
            "normalisation": s.clip.normalisation,
            "independent": s.independent_hash,
            "judge": s.judge_hash,
            "feature_blocks": s.model.feature_blocks,
        },
        "03_train": {
            "run": s.run_hash,
            "independent": s.independent_hash,
            "evaluation": {key: value for key, value in e.items() if key != "study"},
        },
        **{name: {"runs": groups[name], "scores": scoring(s)} for name in GROUPS_OF},
        "08_figures_and_tables": {
            "runs": groups["08_figures_and_tables"],
            "scores": scoring(s),
            "run": s.run_hash,
            "evaluation": e,
        },
    }


def _check_data(s: Settings, profile: str, data: str | None, folder: Path) -> None:
    there = (folder / f"prepared-{s.data_hash}/manifest.json").is_file()
    if s.data.dataset != "synthetic" and not data and not there:
        raise SettingsError(
            f"profile {profile} needs the {s.data.dataset} dataset: give its root folder, "
            f"make reproduce PROFILE={profile} DATA=ROOT; `ratlip download {s.data.dataset} --to ROOT` "
            "fetches it or says where to get it. The profile demo needs no data"
        )
    if data and not Path(data).expanduser().is_dir():
        raise SettingsError(f"DATA={data}: there is no such folder; give the root of the {s.data.dataset} dataset")


def _digest(name: str, code_only: bool = False) -> str:
    """SHA-256 of a notebook's cells; of its code alone for what words cannot change."""
    notebook = json.loads((repository() / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code" or not code_only]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def _noted(path: Path, content: dict) -> Path:
    wanted = json.dumps(content, indent=2) + "\n"
    if not path.is_file() or path.read_text() != wanted:
        write_text(path, wanted)
    return path


def _for_shell(parameters: dict[str, Any]) -> str:
    """`-p name value ...` of `python -m ratlip.report.notebooks run`; JSON is YAML, so a dict travels as it is."""
    return " ".join(
        f"-p {name} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
        for name, value in parameters.items()
    )


def up_to_date(targets: dict[str, str], depends: dict[str, Path]) -> bool:
    """Whether every target is there and newer than what it depends on."""
    made = {name: repository() / target for name, target in targets.items()}
    return all(made[name].is_file() and made[name].stat().st_mtime >= depends[name].stat().st_mtime for name in made)


def closing(report: Path) -> str:
    """The last words of `make reproduce`: which file to open."""
    page = report / "index.html"
    found = [page] if page.is_file() else sorted(report.glob("notebooks/[0-9][0-9]_*.ipynb"))
    lines = [f"  {shown(path)}" for path in found if ".failed." not in path.name]
    return "\n".join(["Open:", *lines, "The notebooks with their answers: `make lab`, or the links of that page."])
