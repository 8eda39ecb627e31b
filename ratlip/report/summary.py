"""Where a report comes from, and its summary under the headings of the ML Reproducibility Challenge.

Every number in the summary is read from results; prose stands where nothing was measured.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ratlip.files import read_json
from ratlip.provenance import describe
from ratlip.report.notebooks import STORY
from ratlip.settings import Settings
from ratlip.studies import grid

OPEN = "not answered yet"
DECIDED = ("supported", "contradicted", "undecided")


# ---------------------------------------------------------------------------------------------- provenance


def provenance(settings: Settings, root: Path, report: Path) -> dict[str, Any]:
    """Commit, versions, hardware, settings, data and CLIP checksums, every run with its duration. No path.

    `root`: the profile's outputs; `report`: the report's folder. What is not there is left out or named
    missing.
    """
    labels: dict[str, list[str]] = {settings.run_name: ["main run"]}
    for run in grid.plan(settings):
        names = labels.setdefault(run.name, [])
        if run.label not in names:
            names.append(run.label)
    rows, missing = [], []
    for name, its in labels.items():
        found = _read(root / "runs" / name / "provenance.json")
        if found is None:
            missing.append(name)
        else:
            rows.append(
                {
                    "run": name,
                    "variant": " = ".join(its),
                    **{
                        key: found.get(key)
                        for key in (
                            "seed",
                            "steps",
                            "training_seconds",
                            "devices",
                            "threads",
                            "peak_memory_mib",
                            "commit",
                            "uncommitted_changes",
                            "processor",
                            "accelerators",
                            "time",
                        )
                    },
                }
            )
    return {
        "profile": Path(settings.profile).stem,
        "made": describe(),
        "settings": _without_paths(settings),
        "data": _data(root, settings),
        "clip": _clip(root, settings.clip_hash),
        "independent_clip": _clip(root, settings.independent_hash),
        "runs": rows,
        "missing_runs": missing,
        "training_seconds": round(sum(row["training_seconds"] for row in rows), 1),
        "notebooks": _notebooks(report),
    }


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _without_paths(settings: Settings) -> dict:
    """All settings, a file by its name alone."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(each) for key, each in value.items()}
        return value.name if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

    return shorten(settings.model_dump()) | {"profile": Path(settings.profile).stem}


def _data(root: Path, settings: Settings) -> dict | None:
    found = _read(root / f"prepared-{settings.data_hash}" / "manifest.json")
    return found and {
        key: found.get(key) for key in ("name", "counts", "captions", "resize", "content_sha256", "records_sha256")
    }


def _clip(root: Path, identity: str | None) -> dict | None:
    found = identity and _read(root / f"clip-{identity}" / "manifest.json")
    return {"folder": f"clip-{identity}", "fingerprint": found.get("fingerprint")} if found else None


def _notebooks(report: Path) -> dict[str, dict]:
    found = {}
    for name in STORY:
        notebook = _read(report / "notebooks" / f"{name}.ipynb")
        if notebook is not None:  # digest of the code that ran, and how long it took where that was noted
            found[name] = dict(notebook.get("metadata", {}).get("ratlip", {}))
    return found


def origin(content: dict) -> list[tuple[str, str]]:
    """What a reader asks first, as rows (what, value)."""
    made, data = content["made"], content["data"]
    commits = sorted({str(run["commit"])[:12] for run in content["runs"] if run["commit"]})
    machines = sorted({_machine(run) for run in content["runs"]})
    seconds = {name: each["seconds"] for name, each in content["notebooks"].items() if "seconds" in each}
    rows = [
        (
            "report made",
            f"{made['time']}, commit {str(made['commit'])[:12]}"
            f"{', with uncommitted changes' if made['uncommitted_changes'] else ''}",
        ),
        ("runs made with", f"commit {', '.join(commits)}" if commits else "no runs"),
        ("hardware of the runs", "; ".join(machines) or "no runs"),
        (
            "versions",
            ", ".join(
                [
                    f"Python {made['python']}",
                    *[f"{name} {version}" for name, version in made["versions"].items() if version],
                ]
            ),
        ),
        ("seeds", ", ".join(map(str, sorted({run["seed"] for run in content["runs"]}))) or "no runs"),
        (
            "training of all runs",
            f"{duration(content['training_seconds'])} ({_counted(content['runs'], 'run')}; the sum, though "
            "several may have run side by side)",
        ),
    ]
    if seconds:
        each = ", ".join(f"{name[:2]}: {duration(value)}" for name, value in seconds.items())
        rows.append(("notebooks", f"{duration(sum(seconds.values()))} ({each})"))
    if data:
        counts = ", ".join(f"{count:,} {split}" for split, count in data["counts"].items())
        rows.append(
            ("data", f"{data['name']}: {counts} images; SHA-256 of the prepared content {data['content_sha256']}")
        )
    for name, key in (("CLIP of the networks", "clip"), ("independent CLIP", "independent_clip")):
        if content[key]:
            rows.append((name, f"trained here, fingerprint {content[key]['fingerprint']}"))
    return rows


def _machine(run: dict) -> str:
    cards = ", ".join(run["accelerators"] or [])
    return f"{run['devices']}" + (
        f" ({cards})"
        if cards and "cuda" in str(run["devices"])
        else f" ({run['processor']}, {run['threads']} thread{'s' * (run['threads'] != 1)})"
    )


def _counted(things: list, name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


# ------------------------------------------------------------------------------------------------- summary


def summary(settings: Settings, claims: list[dict], content: dict) -> list[dict]:
    """The sections of the summary: dicts with `title`, `text` (paragraphs) and `points`."""
    return [
        {"title": "Scope of reproducibility", **_scope(settings, claims)},
        {"title": "Methodology", **_methodology(settings, content)},
        {"title": "Results", **_results(claims, content)},
        {"title": "What was easy", "text": [], "points": EASY},
        {"title": "What was difficult", "text": [], "points": DIFFICULT},
        {
            "title": "Communication with original authors",
            "points": [],
            "text": ["None. What is said of the published code was read from it and measured by running its parts."],
        },
    ]


EASY = [
    "The method's parts are standard ones and small: two MLPs an affine, one LSTM cell, shuffle attention"
    " as in SA-Net.",
    "The published code fixes what the paper leaves out: layer sizes, the mapper, losses, penalty, learning rates.",
    "It can be checked layer by layer: its checkpoints load into the networks written here, and tests "
    "compare maps, logits, losses and gradients.",
]
DIFFICULT = [
    "The published code does not compute what the paper says. Its LSTM takes the batch for the time axis,"
    " each of 16 affines has an LSTM of its own, no state goes from one layer to the next, and the "
    "synthesis blocks use CAT. Numbers made with it are not those of the method that the paper describes "
    "(notebook 7).",
    "It does not run today: a single process fails for want of a process group, CUDA is hard-coded in the"
    " penalty, and arguments of pandas and SciPy that it uses are gone or going.",
    "Its command-line defaults override the configuration file, so that the batch size of 16 becomes 1, "
    "at which the mismatched sentence is the matching one.",
    "Its scores are not the standard ones: pixels are normalised twice before CLIP, Inception gets values"
    " of another range, and the last partial batch is not counted.",
    "The published numbers come without seeds or spread; on CUB the FID of GALIP is better than RATLIP's;"
    " an earlier version of the table has two columns the other way round.",
    "The size and the rule of CelebA-tiny are not published, and the paper gives Grad-CAM maps without a number.",
]


def _scope(s: Settings, claims: list[dict]) -> dict:
    scale = (
        f"This report is of the profile {Path(s.profile).stem} ({s.summary}): {s.model.image_size} px, where "
        "the paper has 224."
        if s.model.image_size != 224
        else f"This report is of the profile {Path(s.profile).stem} ({s.summary}), at the paper's 224 px."
    )
    limit = (
        "What holds at this size need not hold at the paper's, and the reverse." if s.model.image_size != 224 else ""
    )
    text = [
        "The paper claims that affine transformations connected by an LSTM (RAT) give better images and a "
        "better match of text and image than isolated ones (CAT), that shuffle attention between them helps, "
        f"that a hidden size of 64 is best, and that the result beats earlier models. {scale} {limit}".strip()
    ]
    tested = [each["claim"] for each in claims if each["verdict"] != OPEN]
    return {"text": [*text, "Tested were:" if tested else "Nothing of this has been tested yet."], "points": tested}


def _methodology(s: Settings, content: dict) -> dict:
    e, t, data = s.experiments, s.training, content["data"]
    steps = e.steps or t.steps
    budget = f"{steps:,} steps" if steps else f"{t.epochs:,} epochs"
    points = [
        "Networks, losses and training were written anew from the paper and from the published code; each "
        "difference between the two is a named setting, and the paper's form is the default.",
        f"Every variant of the grid: {budget} of batch {t.batch_size}, Adam {t.lr_g:g} (generator) and "
        f"{t.lr_d:g} (discriminator), {e.seeds} seeds ({e.versus_seeds} for the published against the "
        "corrected form).",
        f"Scores from {s.evaluation.images:,} generated images of test captions; features of "
        f"{_extractor(s)}. Arms are compared seed by seed by 95 % t intervals of the paired differences.",
    ]
    if s.independent:
        points.append("The CLIP score is also taken with a second CLIP, which no generator was trained with.")
    if data:
        counts = " and ".join(f"{count:,} {split}" for split, count in data["counts"].items())
        points.insert(1, f"Data: {data['name']}, {counts} images.")
    machines = "; ".join(sorted({_machine(run) for run in content["runs"]}))
    if machines:
        points.append(
            f"Computation: {_counted(content['runs'], 'run')}, {duration(content['training_seconds'])} of "
            f"training in sum, on {machines}."
        )
    return {"text": [], "points": points}


def _extractor(s: Settings) -> str:
    if s.evaluation.extractor == "inception":
        return "torch-fidelity's Inception"
    return f"the {'independent ' if s.independent else ''}CLIP, so that distances are not the literature's FID"


def _results(claims: list[dict], content: dict) -> dict:
    waiting = [each["claim"] for each in claims if each["verdict"] == OPEN]
    claims = [each for each in claims if each["verdict"] != OPEN]
    count = Counter(each["verdict"] for each in claims)
    said = [f"{count[word]} {word}" for word in DECIDED if count[word]]
    said += [f"{number} {word}" for word, number in count.items() if word not in DECIDED]
    text = [f"Of {_counted(claims, 'claim')}: {', '.join(said)}." if claims else "No claim has been tested yet."]
    if waiting:
        text.append(f"Not answered yet: {' '.join(waiting)}")
    if content["missing_runs"]:
        text.append(
            f"{len(content['missing_runs'])} of {len(content['missing_runs'] + content['runs'])} runs of the "
            "grid are missing."
        )
    return {
        "text": text,
        "points": [
            f"{each['claim']}: {each['verdict']}" + (f" ({each['evidence']})" if each["verdict"] in DECIDED else "")
            for each in claims
        ],
    }


def markdown(settings: Settings, sections: list[dict]) -> str:
    """The summary as Markdown."""
    lines = [
        f"# Reproducibility summary: RATLIP, profile {Path(settings.profile).stem}",
        "",
        "Headings of the ML Reproducibility Challenge. Made from the results by `python -m ratlip.report.page`.",
        "",
    ]
    for part in sections:
        lines += [
            f"## {part['title']}",
            "",
            *[line for text in part["text"] for line in (text, "")],
            *[f"- {point}" for point in part["points"]],
            *([""] if part["points"] else []),
        ]
    return "\n".join(lines).rstrip() + "\n"
