"""The report of a profile: one page to open, reports/<profile>/index.html, and what it links to.

    python -m ratlip.report.page --profile demo

It reads what the notebooks have left in the report's folder (executed notebooks, figures, tables, verdicts)
and the run folders' provenance, and makes the page, the notebooks as web pages, `provenance.json` and
`reproducibility.md`. What is missing is named, with the command that makes it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import yaml

from ratlip.errors import RatlipError, RunError
from ratlip.files import outputs_folder, read_json, repository, shown, write_json, write_text
from ratlip.report.notebooks import STORY
from ratlip.settings import Settings, load_settings

# What each notebook answers, for the page where it has not been run.
QUESTIONS = {
    "04_ablation": "Is RAT better than CAT, and does shuffle attention help?",
    "05_hidden_size_sweep": "Is h = 64 the best hidden size?",
    "06_grad_cam": "Does the network look at the whole object at h = 64?",
    "07_paper_versus_code": "Does the published code compute what the paper says, and does it matter?",
    "08_figures_and_tables": "Are the scores better than others', is anything copied, what does it cost?",
}
MARKS = {"supported": ("✓", "supported"), "contradicted": ("✗", "contradicted")}


def save_verdicts(report: str | Path | None, notebook: str, verdicts: Sequence[dict]) -> None:
    """Keep a notebook's answers for the page: <report>/verdicts/<notebook>.json; nothing without a report.

    `verdicts`: dicts of text with `claim` (what the paper says), `verdict` ("supported", "contradicted",
    "undecided", or another word) and `evidence` (the numbers behind it). Raises RunError where one is
    missing.
    """
    for i, each in enumerate(verdicts):
        missing = [key for key in ("claim", "verdict", "evidence") if not str(each.get(key) or "").strip()]
        if missing:
            raise RunError(f"{notebook}: verdict {i + 1} has no {', '.join(missing)}; give each as text")
    if report:
        path = repository() / report / "verdicts" / f"{notebook}.json"
        write_json(path, [{key: str(value) for key, value in each.items()} for each in verdicts])


def load_verdicts(report: str | Path) -> dict[str, list[dict]]:
    """What `save_verdicts` has kept, by notebook, in the notebooks' order. RunError names a damaged file."""
    found = {}
    for path in sorted((repository() / report / "verdicts").glob("*.json")):
        try:
            found[path.stem] = [
                {key: each[key] for key in ("claim", "verdict", "evidence")} for each in read_json(path)
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{shown(path)}: damaged ({type(error).__name__}); delete it and run notebooks/{path.stem}.ipynb again"
            ) from error
    return found


# ------------------------------------------------------------------------------------- what the page holds


def answers(report: Path, profile: str) -> list[dict]:
    """One dict a claim: notebook, claim, verdict, evidence, mark, kind; for a notebook without, how to get
    it.
    """
    from ratlip.report import summary

    found, rows = load_verdicts(report), []
    for notebook in dict.fromkeys([*QUESTIONS, *found]):
        unanswered = {"claim": QUESTIONS.get(notebook, notebook), "verdict": summary.OPEN, "evidence": how(profile)}
        page = f"notebooks/{notebook}.html" if (report / "notebooks" / f"{notebook}.ipynb").is_file() else None
        for each in found.get(notebook) or [unanswered]:
            mark, kind = MARKS.get(each["verdict"], ("?", "open"))
            rows.append({"notebook": notebook, "link": page, "mark": mark, "kind": kind, **each})
    return rows


def how(profile: str) -> str:
    """The command that makes what is missing."""
    return f"not run yet: make reproduce PROFILE={profile}"


def pictures(report: Path) -> list[dict]:
    """The figures in the report: name, caption, link to the PNG and, where there is one, to the SVG."""
    captions = yaml.safe_load((resources.files("ratlip.report") / "templates" / "figures.yaml").read_text("utf-8"))
    order = {name: i for i, name in enumerate(captions)}
    paths = sorted((report / "figures").glob("*.png"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
    return [
        {
            "name": path.stem,
            "caption": captions.get(path.stem, path.stem.replace("_", " ").capitalize()),
            "png": f"figures/{path.name}",
            "svg": f"figures/{path.stem}.svg" if path.with_suffix(".svg").is_file() else None,
        }
        for path in paths
    ]


def printed_tables(report: Path) -> list[dict]:
    """The tables in the report: caption, header, rows, notes, and the names of their files."""
    from ratlip.report.tables import read_markdown

    found, order = [], ["published_fid", "published_clip_score", "published_and_measured"]
    paths = sorted(
        (report / "tables").glob("*.md"), key=lambda p: (order.index(p.stem) if p.stem in order else len(order), p.stem)
    )
    for path in paths:
        try:
            table = read_markdown(path.read_text("utf-8"))
        except ValueError as error:
            raise RunError(f"{shown(path)}: {error}; delete it and run the notebook that made it") from error
        files = [f"tables/{path.stem}{end}" for end in (".csv", ".md", ".tex")]
        found.append(
            {
                "name": path.stem,
                "caption": table.caption,
                "header": list(table.view.columns),
                "rows": table.view.to_numpy().tolist(),
                "notes": table.notes,
                "files": [file for file in files if (report / file).is_file()],
            }
        )
    return found


def notebook_pages(report: Path) -> list[dict]:
    """Make every executed notebook's page; one dict a notebook: name, title, links, or that it is missing."""
    from ratlip.report import html

    rows = []
    for name in STORY:
        executed = report / "notebooks" / f"{name}.ipynb"
        page = executed.with_suffix(".html")
        if not executed.is_file():
            page.unlink(missing_ok=True)  # an old page would pass for a new one
            shutil.rmtree(page.with_name(f"{name}_files"), ignore_errors=True)
            rows.append({"name": name, "missing": True})
            continue
        html.notebook_page(executed, page)
        title = re.search(r"<title>(.*?)</title>", page.read_text("utf-8"))[1]
        rows.append(
            {
                "name": name,
                "title": title,
                "html": f"notebooks/{page.name}",
                "missing": False,
                "ipynb": f"notebooks/{executed.name}",
            }
        )
    return rows


# --------------------------------------------------------------------------------------------------- the page


def build(profile: str, outputs: str | Path | None = None, report: str | Path | None = None) -> Path:
    """Make the page and all that it links to; the path of index.html. `report`: [reports/<profile>]."""
    from ratlip.report import html, summary

    settings: Settings = load_settings(profile)
    name = Path(settings.profile).stem
    folder = repository() / (report or f"reports/{name}")
    if report is not None and not folder.is_dir():
        raise RunError(f"{shown(folder)}: there is no such report; `make reproduce PROFILE={profile}` makes one")
    folder.mkdir(parents=True, exist_ok=True)
    provenance = summary.provenance(settings, outputs_folder(settings.profile, outputs), folder)
    write_json(folder / "provenance.json", provenance)
    claims = answers(folder, name)
    sections = summary.summary(settings, claims, provenance)
    write_text(folder / "reproducibility.md", summary.markdown(settings, sections))
    page = (
        html.environment()
        .get_template("index.html.j2")
        .render(
            profile=name,
            about=settings.summary,
            budget=budget(settings),
            claims=claims,
            pictures=pictures(folder),
            tables=printed_tables(folder),
            notebooks=notebook_pages(folder),
            summary=sections,
            origin=summary.origin(provenance),
            missing=provenance["missing_runs"],
            runs=[
                [
                    run["run"],
                    run["variant"],
                    run["seed"],
                    f"{run['steps']:,}",
                    f"{run['training_seconds']:.0f}",
                    run["devices"],
                    str(run["commit"])[:8],
                ]
                for run in provenance["runs"]
            ],
            settings=yaml.safe_dump(provenance["settings"], sort_keys=False),
        )
    )
    _check_private(page, folder)
    write_text(folder / "index.html", page)
    return folder / "index.html"


def budget(settings: Settings) -> str:
    """How long and how often the compared runs were trained, in a sentence."""
    e, t = settings.experiments, settings.training
    main = f"{t.steps:,} steps" if t.steps is not None else f"{t.epochs:,} epochs"
    each = f"{e.steps:,} steps" if e.steps is not None else main
    short = (
        ""
        if each == main
        else (
            f" The main run of notebook 3 was trained for {main}: short trainings compare how fast a variant learns, and "
            "say nothing about where it ends."
        )
    )
    return (
        f"The compared runs were trained for {each} each, {e.seeds} seeds a variant ({e.versus_seeds} for published "
        f"against corrected).{short}"
    )


def _check_private(page: str, folder: Path) -> None:
    """Refuse to write a page that names a folder of this machine."""
    for place in {str(repository()), str(Path.home()), str(Path.cwd())} - {"/"}:
        if re.search(re.escape(place) + r"(?=[/\"'<\s]|$)", page):
            raise RunError(
                f"{shown(folder)}: a path of this machine ({place}) stands in the report; "
                "look for it in its tables, verdicts and settings"
            )


def main() -> None:
    """Entry point of `python -m ratlip.report.page`."""
    parser = argparse.ArgumentParser(
        prog="python -m ratlip.report.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", "-p", default="demo")
    parser.add_argument("--outputs", help="where the runs are [outputs/<profile>]")
    parser.add_argument("--report", help="the report's folder [reports/<profile>]")
    chosen = parser.parse_args()
    try:
        print(shown(build(chosen.profile, chosen.outputs, chosen.report)))
    except RatlipError as error:
        sys.exit(f"ratlip: {error}")


if __name__ == "__main__":
    main()
