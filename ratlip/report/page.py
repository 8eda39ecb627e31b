"""The report of a profile: one page to open, reports/<profile>/index.html, and what it links to.

It reads what the notebooks have left in the report's folder (executed notebooks, figures, tables, verdicts) and the
run folders' provenance, and makes the page, the notebooks as web pages, `provenance.json` and `reproducibility.md`.
What is missing is named, with the command that makes it. Sentences stand in `templates`, numbers come from results.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import yaml

from ratlip.errors import RunError
from ratlip.files import outputs_folder, read_json, repository, shown, write_json, write_text
from ratlip.provenance import describe
from ratlip.report.notebooks import STORY
from ratlip.settings import Settings, load_settings
from ratlip.studies import grid

OPEN = "not answered yet"
DECIDED = ("supported", "contradicted", "undecided")
WORDS = yaml.safe_load((Path(__file__).parent / "templates" / "captions.yaml").read_text("utf-8"))
QUESTIONS: dict[str, str] = WORDS["questions"]
# What a run's provenance and a prepared set's manifest give to the report's provenance
OF_RUN = ["seed", "steps", "training_seconds", "devices", "threads", "peak_memory_mib"]
OF_RUN += ["commit", "uncommitted_changes", "processor", "accelerators", "time"]
ANSWER = ("claim", "verdict", "evidence")  # what each verdict of a notebook holds
OF_DATA = ("name", "counts", "captions", "resize", "content_sha256", "records_sha256")


def save_verdicts(report: str | Path | None, notebook: str, verdicts: Sequence[dict]) -> None:
    """Keep a notebook's answers for the page: <report>/verdicts/<notebook>.json; nothing without a report.

    `verdicts`: dicts of text with `claim` (what the paper says), `verdict` ("supported", "contradicted", "undecided",
    or another word) and `evidence` (the numbers behind it). Raises RunError where one is missing.
    """
    for i, each in enumerate(verdicts, start=1):
        if missing := [key for key in ANSWER if not str(each.get(key) or "").strip()]:
            raise RunError(f"{notebook}: verdict {i} has no {', '.join(missing)}; give each as text")
    if report:
        path = repository() / report / "verdicts" / f"{notebook}.json"
        write_json(path, [{key: str(value) for key, value in each.items()} for each in verdicts])


def verdicts(claims: dict[str, tuple[str, str]]) -> list[dict]:
    """Answers as `save_verdicts` takes them, from claim -> (verdict, evidence)."""
    return [{"claim": claim, "verdict": word, "evidence": why} for claim, (word, why) in claims.items()]


def load_verdicts(report: str | Path) -> dict[str, list[dict]]:
    """What `save_verdicts` has kept, by notebook, in the notebooks' order. RunError names a damaged file."""
    found = {}
    for path in sorted((repository() / report / "verdicts").glob("*.json")):
        try:
            found[path.stem] = [{key: each[key] for key in ANSWER} for each in read_json(path)]
        except (ValueError, KeyError, TypeError) as error:
            mend = f"delete it and run notebooks/{path.stem}.ipynb again"
            raise RunError(f"{shown(path)}: damaged ({type(error).__name__}); {mend}") from error
    return found


def answers(report: Path, profile: str) -> list[dict]:
    """One dict a claim: notebook, link, claim, verdict, evidence; without an answer, how to get one."""
    found, rows, how = load_verdicts(report), [], f"not run yet: make reproduce PROFILE={profile}"
    for notebook in dict.fromkeys([*QUESTIONS, *found]):
        unanswered = {"claim": QUESTIONS.get(notebook, notebook), "verdict": OPEN, "evidence": how}
        page = f"notebooks/{notebook}.html"
        there = any((report / page).with_suffix(end).is_file() for end in (".ipynb", ".html"))
        said = {"notebook": notebook, "link": page if there else None}
        rows += [said | each for each in found.get(notebook) or [unanswered]]
    return rows


def _ordered(paths: Path, pattern: str, order: Sequence[str]) -> list[Path]:
    return sorted(paths.glob(pattern), key=lambda path: ([*order, path.stem].index(path.stem), path.stem))


def pictures(report: Path) -> list[dict]:
    """The figures in the report: name, caption, and whether there is an SVG beside the PNG."""
    found, captions = [], WORDS["figures"]
    for path in _ordered(report / "figures", "*.png", list(captions)):
        caption = captions.get(path.stem, path.stem.replace("_", " ").capitalize())
        found.append({"name": path.stem, "caption": caption, "svg": path.with_suffix(".svg").is_file()})
    return found


def printed_tables(report: Path) -> list[dict]:
    """The tables in the report (`tables.write`): caption, columns, data (rows of text), notes, and their files."""
    found = []
    for path in _ordered(report / "tables", "*.json", WORDS["tables"]):
        try:
            table = {key: read_json(path)[key] for key in ("caption", "columns", "data", "notes")}
        except (ValueError, KeyError, TypeError) as error:
            mend = "delete it and run the notebook that made it"
            raise RunError(f"{shown(path)}: not a table of ratlip ({type(error).__name__}); {mend}") from error
        files = [f"tables/{path.stem}.{end}" for end in ("csv", "md", "tex") if path.with_suffix(f".{end}").is_file()]
        found.append({**table, "files": files})
    return found


def notebook_pages(report: Path) -> list[dict]:
    """Make every executed notebook's page; one dict a notebook: name, title (None: no page), link to its source.

    A page without its executed notebook stays: pages are committed, executed notebooks are not.
    """
    from ratlip.report import html

    rows = []
    for name in STORY:
        executed, stored = report / "notebooks" / f"{name}.ipynb", repository() / "notebooks" / f"{name}.ipynb"
        page, title = executed.with_suffix(".html"), None
        inside = stored.is_file() and report.is_relative_to(repository())
        source = os.path.relpath(stored, report) if inside else None
        if executed.is_file():
            title = html.notebook_page(executed, page, source and f"../{source}")
        elif page.is_file():
            found = re.search(r"<title>(.+?)</title>", page.read_text("utf-8"))
            title = unescape(found[1]) if found else name
        rows.append({"name": name, "title": title, "source": source})
    return rows


def provenance(s: Settings, root: Path, report: Path) -> dict[str, Any]:
    """Commit, versions, hardware, settings, data and CLIP checksums, every run with its duration. No path.

    `root`: the profile's outputs; `report`: the report's folder. What is not there is left out or named missing.
    """
    labels: dict[str, list[str]] = {s.run_name: ["main run"]}
    for run in grid.plan(s):
        labels.setdefault(run.name, []).append(run.label)
    found = {name: _read(root / "runs" / name / "provenance.json") for name in labels}
    variants = {name: " = ".join(dict.fromkeys(each)) for name, each in labels.items()}
    made = {name: each for name, each in found.items() if each is not None}
    runs = [{"run": name, "variant": variants[name], **_part(each, *OF_RUN)} for name, each in made.items()]
    prepared = _read(root / f"prepared-{s.data_hash}" / "manifest.json")
    notebooks = {name: _read(report / "notebooks" / f"{name}.ipynb") for name in STORY}
    settings = json.loads(json.dumps(s.model_dump(), default=lambda path: path.name))  # a file by its name alone
    return {
        "profile": Path(s.profile).stem,
        "made": describe(),
        "settings": settings | {"profile": Path(s.profile).stem},
        "data": prepared and _part(prepared, *OF_DATA),
        "clip": _clip(root, s.clip_hash),
        "independent_clip": _clip(root, s.independent_hash),
        "runs": runs,
        "missing_runs": [name for name in found if name not in made],
        "training_seconds": round(sum(run["training_seconds"] for run in runs), 1),
        # digest of the code that ran, and how long it took where that was noted
        "notebooks": {name: each.get("metadata", {}).get("ratlip", {}) for name, each in notebooks.items() if each},
    }


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _part(found: dict, *keys: str) -> dict:
    return {key: found.get(key) for key in keys}


def _clip(root: Path, identity: str | None) -> dict | None:
    found = identity and _read(root / f"clip-{identity}" / "manifest.json")
    return {"folder": f"clip-{identity}", "fingerprint": found.get("fingerprint")} if found else None


def origin(content: dict) -> dict[str, str]:
    """What a reader asks first about a provenance: what -> value."""
    made, data, runs = content["made"], content["data"], content["runs"]
    commits = sorted({str(run["commit"])[:12] for run in runs if run["commit"]})
    versions = {"Python": made["python"], **made["versions"]}
    seconds = {name[:2]: each["seconds"] for name, each in content["notebooks"].items() if "seconds" in each}
    changed = ", with uncommitted changes" if made["uncommitted_changes"] else ""
    of_runs = f"{_count(runs, 'run')}; the sum, though several may have run side by side"
    rows = {
        "report made": f"{made['time']}, commit {str(made['commit'])[:12]}{changed}",
        "runs made with": f"commit {', '.join(commits)}" if commits else "no runs",
        "hardware of the runs": "; ".join(machines(runs)) or "no runs",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "seeds": ", ".join(map(str, sorted({run["seed"] for run in runs}))) or "no runs",
        "training of all runs": f"{duration(content['training_seconds'])} ({of_runs})",
    }
    if seconds:
        each = ", ".join(f"{number}: {duration(value)}" for number, value in seconds.items())
        rows["notebooks"] = f"{duration(sum(seconds.values()))} ({each})"
    if data:
        counts = ", ".join(f"{count:,} {split}" for split, count in data["counts"].items())
        rows["data"] = f"{data['name']}: {counts} images; SHA-256 of the prepared content {data['content_sha256']}"
    for name, key in (("CLIP of the networks", "clip"), ("independent CLIP", "independent_clip")):
        if content[key]:
            rows[name] = f"trained here, fingerprint {content[key]['fingerprint']}"
    return rows


def machines(runs: Sequence[dict]) -> list[str]:
    """The different hardware of the runs: "1 x cpu (a processor, 2 threads)"."""

    def machine(run: dict) -> str:
        cards = ", ".join(run["accelerators"] or []) if "cuda" in str(run["devices"]) else ""
        threads = f"{run['threads']} thread{'s' * (run['threads'] != 1)}"
        return f"{run['devices']} ({cards})" if cards else f"{run['devices']} ({run['processor']}, {threads})"

    return sorted({machine(run) for run in runs})


def _count(things: Sequence, name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def summary(s: Settings, claims: Sequence[dict], content: dict) -> str:
    """The summary under the headings of the ML Reproducibility Challenge, as Markdown."""
    from ratlip.report.html import TEMPLATES

    tested, runs = [each for each in claims if each["verdict"] != OPEN], content["runs"]
    count = Counter(each["verdict"] for each in tested)
    words = {
        "waiting": " ".join(each["claim"] for each in claims if each["verdict"] == OPEN),
        "said": ", ".join(f"{count[word]} {word}" for word in dict.fromkeys([*DECIDED, *count]) if count[word]),
        "claims": _count(tested, "claim"),
        "work": f"{_count(runs, 'run')}, {duration(content['training_seconds'])} of training in sum",
        "machines": "; ".join(machines(runs)),
    }
    template, budget = TEMPLATES.get_template("reproducibility.md.j2"), budgets(s)[0]
    return template.render(s=s, content=content, budget=budget, tested=tested, decided=DECIDED, **words)


def budgets(s: Settings) -> tuple[str, str]:
    """How long the compared runs and the main run are trained: "200 steps", "1,500 epochs"."""
    main = f"{s.training.epochs:,} epochs" if s.training.steps is None else f"{s.training.steps:,} steps"
    return main if s.experiments.steps is None else f"{s.experiments.steps:,} steps", main


def build(profile: str, outputs: str | Path | None = None, report: str | Path | None = None) -> Path:
    """Make the page and all that it links to; the path of index.html. `report`: [reports/<profile>].

    RunError where a given report does not exist, holds a damaged file or names a folder of this machine.
    """
    import mistune  # this and nbconvert take a second, for which notebooks, which keep verdicts, need not wait

    from ratlip.report.html import TEMPLATES

    s = load_settings(profile)
    name = Path(s.profile).stem
    folder = repository() / (report or f"reports/{name}")
    if report is not None and not folder.is_dir():
        raise RunError(f"{shown(folder)}: there is no such report; `make reproduce PROFILE={profile}` makes one")
    folder.mkdir(parents=True, exist_ok=True)
    content, claims = provenance(s, outputs_folder(s.profile, outputs), folder), answers(folder, name)
    text = summary(s, claims, content)
    parts = {
        "pictures": pictures(folder),
        "tables": printed_tables(folder),
        "notebooks": notebook_pages(folder),
        "summary": mistune.create_markdown()(re.sub(r"(?m)^#", "##", text)),
        "origin": origin(content),
        "settings": yaml.safe_dump(content["settings"], sort_keys=False),
    }
    template = TEMPLATES.get_template("index.html.j2")
    page = template.render(s=s, profile=name, budgets=budgets(s), claims=claims, content=content, **parts)
    for place in {str(repository()), str(Path.home()), str(Path.cwd())} - {"/"}:
        if re.search(re.escape(place) + r"(?=[/\"'<\s]|$)", page):
            mend = "look for it in its tables, verdicts and settings"
            raise RunError(f"{shown(folder)}: a path of this machine ({place}) stands in the report; {mend}")
    write_json(folder / "provenance.json", content)
    write_text(folder / "reproducibility.md", f"{text}\n")
    write_text(folder / "index.html", page)
    return folder / "index.html"
