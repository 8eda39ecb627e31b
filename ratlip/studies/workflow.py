"""What `make reproduce` runs, for the Snakefile: every notebook and every run, and what its result depends on.

What a result depends on is a digest among its rule's `params`. Snakemake keeps these with what it made, and makes again
what has other ones now.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ratlip.cache import digest
from ratlip.files import outputs_folder, repository, shown
from ratlip.report.notebooks import STORY, execute
from ratlip.settings import Settings, load_settings
from ratlip.studies import campaign, grid

MAIN = "main run"


@dataclass(frozen=True)
class Plan:
    """The jobs of a profile, by the name of the notebook or of the run folder; files from the repository's root."""

    report: str
    outputs: str
    executed: dict[str, str]  # the notebooks with their outputs: of the story in the report, of a run in its folder
    runs: list[str]
    studies: list[str]  # the notebooks that read runs
    reads: dict[str, list[str]]  # notebook (or "run": each run) -> files that must be there first
    made: tuple[str, str]  # empty files: what the first and the second notebook leave in outputs/ was made here
    depends: dict[str, str]  # digest of what the result depends on
    parameters: dict[str, str]  # executed notebook -> what `ratlip notebook run` is given, for the shell


def plan(profile: str, data: str | None = None) -> Plan:
    """The plan of a profile. SettingsError for one that needs a data set, where it is neither prepared nor given."""
    s = load_settings(profile)
    folder, report = outputs_folder(s.profile), f"reports/{s.profile}"
    if data or not s.data.generated:
        from ratlip.workspace import require_data  # brings torch: 2.4 s that the demo need not wait for

        require_data(s, data, prepared=(folder / f"prepared-{s.data_hash}/manifest.json").is_file())
    runs = {run.name: run for run in grid.unique(grid.plan(s))}
    groups = studies()
    names = {name: [run.name for run in grid.unique(_read(s, each))] for name, each in groups.items()}
    names["03_train"] = [name for name in runs if name == s.run_name]  # where it is in the grid, it is not made twice
    executed = {name: f"{report}/notebooks/{name}.ipynb" for name in STORY}
    executed |= {name: shown(folder / "runs" / name / "03_train.ipynb") for name in runs}
    reads = {name: [executed[run] for run in names.get(name, [])] for name in [*STORY, "run"]}
    for name in [name for name, each in groups.items() if MAIN in each]:
        reads[name].append(executed["03_train"])
    towers = digest([s.data_hash, s.clip_hash, s.independent_hash, s.judge_hash])
    data_made, clip_made = (folder / "made" / name for name in (f"data-{s.data_hash}", f"clip-{towers}"))
    for name, first in {"02_prepare_clip": data_made, "03_train": clip_made, "run": clip_made}.items():
        reads[name] += [] if first.is_file() else [shown(first)]
    given = {name: {"profile": profile, "report": report} for name in STORY}
    given["01_prepare_data"]["data"] = data or ""
    given |= {name: grid.parameters(run, folder) for name, run in runs.items()}
    words = {executed[name]: _for_shell(content) for name, content in given.items()}
    made, depends = (shown(data_made), shown(clip_made)), _depends(s, runs, names)
    return Plan(report, shown(folder), executed, list(runs), list(groups), reads, made, depends, words)


def studies() -> dict[str, list[str]]:
    """The notebooks that read runs -> the groups of runs (`grid.GROUPS`, MAIN) that their metadata name."""
    return {name: found for name in STORY if (found := _notebook(name)["metadata"].get("ratlip", {}).get("reads"))}


def _read(s: Settings, groups: list[str]) -> list[grid.Experiment]:
    return [run for group in groups if group != MAIN for run in grid.plan(s, group)]


def _depends(s: Settings, runs: dict[str, grid.Experiment], names: dict[str, list[str]]) -> dict[str, str]:
    """Digests of what the result of each notebook and each run depends on; `names`: the runs that a notebook reads."""
    usual = {"split"} if s.evaluation.split == "test" else set()  # came later: results of before are not out of date
    e = s.evaluation.model_dump(mode="json", exclude=usual)
    without_study = s.evaluation.model_dump(mode="json", exclude={"study", *usual})
    # what decides a run's scores, but not its weights
    scores = {key: value for key, value in without_study.items() if key not in ("grid_captions", "grid_images")}
    scores["independent"] = s.independent_hash
    clip = [s.data_hash, s.clip_hash, s.clip.normalisation, s.independent_hash, s.judge_hash, s.model.feature_blocks]
    main = [s.run_hash, e]
    contents: dict[str, list] = {
        name: [names[name], scores, *(main if MAIN in groups else [])] for name, groups in studies().items()
    }
    contents |= {
        "01_prepare_data": [s.data.model_dump(mode="json"), s.model.image_size],
        "02_prepare_clip": clip,
        "03_train": [s.run_hash, s.independent_hash, without_study],
    }
    code = _text("03_train", code_only=True)
    notebooks = {name: digest([contents[name], _text(name)]) for name in STORY}
    return notebooks | {name: digest([run.settings.run_hash, scores, code]) for name, run in runs.items()}


def _text(name: str, code_only: bool = False) -> list[str]:
    """A notebook's cells; its code alone for what words cannot change."""
    cells = _notebook(name)["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code" or not code_only]


def _notebook(name: str) -> dict[str, Any]:
    return json.loads((repository() / "notebooks" / f"{name}.ipynb").read_text("utf-8"))


def _for_shell(parameters: dict[str, Any]) -> str:
    """`-p NAME=VALUE ...`; JSON is YAML, so that a dict travels as it is, and a path "12" or "a: b" stays text."""
    texts = {name: value and json.dumps(value, ensure_ascii=False) for name, value in parameters.items()}
    return " ".join(f"-p {shlex.quote(f'{name}={text}')}" for name, text in texts.items())


def smoke_references() -> list[Path]:
    """Execute the story on the profile smoke, from nothing, into tests/notebooks/smoke/, for nbval.

    On one thread, as the tests run it: on two, a last digit may round the other way.
    """
    folder, made = repository() / "tests/notebooks/smoke", []
    runs = [sys.executable, "-c", "from ratlip.studies import workflow; workflow.smoke_runs()"]
    with tempfile.TemporaryDirectory(prefix="ratlip-") as outputs:
        with patch.dict(os.environ, RATLIP_OUTPUTS=outputs, OMP_NUM_THREADS="1"):
            for name in STORY:
                if name == "04_ablation":
                    subprocess.run(runs, check=True, cwd=repository())
                source = repository() / "notebooks" / f"{name}.ipynb"
                made.append(execute(source, folder / source.name, {"profile": "smoke"}))
    return made


def smoke_runs() -> None:
    """The grid of the profile smoke, without a notebook for each run: what notebooks 04 to 08 then find."""
    groups = load_settings("smoke").experiments.groups
    campaign.carry_out([campaign.Stage("smoke", group) for group in groups], progress=False)
