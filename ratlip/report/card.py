"""`ratlip export`: a trained run as one folder to copy, publish or commit, its model card made from its own records.

model.safetensors, config.json   what drawing needs (`ratlip.training.portable`)
README.md                        the card: data, training, scores beside real images, limits, licence
samples.png                      what it draws for captions of the test split; no real image is packed
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ratlip.data.prepared import load_prepared
from ratlip.errors import RunError
from ratlip.files import atomic_path, read_json, write_text
from ratlip.plots.pictures import caption_grid
from ratlip.report.html import TEMPLATES
from ratlip.report.tables import DATASETS, NONE, SCORES
from ratlip.settings import Settings
from ratlip.training import portable
from ratlip.training.generation import Run
from ratlip.training.loop import grid_captions

CARD, SAMPLES = "README.md", "samples.png"
FILES = {portable.WEIGHTS, portable.CONFIG, CARD, SAMPLES}
KEPT = ("steps", "training_seconds", "devices", "commit", "uncommitted_changes", "processor", "accelerators", "time")


def export(
    run: str | Path, to: str | Path, captions: Sequence[str] = (), clip_folder: str | Path | None = None
) -> Path:
    """Write the folder `to` (whole, or not at all; one exported before is replaced) and return it.

    `captions`: of the sample grid; by default those of the run's own grids, evenly spaced over the test split, which
    must be prepared then. RunError where `run` is no run folder, or `to` holds anything else.
    """
    to, opened = Path(to).expanduser(), Run(run, device="cpu", clip_folder=clip_folder)
    if (opened.folder / portable.CONFIG).is_file():
        raise RunError(f"{opened.folder}: is an exported model already; copy the folder")
    if to.is_file() or (foreign := {path.name for path in to.glob("*")} - FILES):
        what = "is a file" if to.is_file() else f"holds other files ({', '.join(sorted(foreign)[:3])})"
        raise RunError(f"{to}: {what}; choose an empty folder")
    captions = list(captions) or _captions(opened)
    about: dict[str, Any] = {"run": opened.name, "step": opened.step}
    about |= {"trained": {k: v for k, v in _record(opened, "provenance.json").items() if k in KEPT}}
    scores = _record(opened, "scores.json")
    about |= {"scores": {name: scores[name] for name in SCORES if scores.get(name) is not None}}
    if opened.settings.clip.source == "train":
        about["arch"] = read_json(opened.clip_folder / "arch.json")
    with atomic_path(to) as draft:
        portable.save(draft, opened.settings, opened.clip, opened.generator, about)
        caption_grid(opened.generate(captions, n=4), captions, draft / SAMPLES)
        write_text(draft / CARD, card(opened, to.name, captions, scores))
    return to


def card(opened: Run, name: str, captions: Sequence[str], scores: dict[str, Any]) -> str:
    """The model card of an opened run, exported into a folder called `name`, in Markdown."""
    manifest = _beside(opened.folder, opened.settings, "manifest.json")
    words = getattr(opened.clip.tokenizer, "words", None)
    made = _record(opened, "provenance.json")
    return TEMPLATES.get_template("card.md.j2").render(
        s=opened.settings,
        run=opened,
        name=name,
        captions=captions,
        rows=_rows(scores),
        scores=scores,
        made=made,
        minutes=made.get("training_seconds", 0) / 60,
        data=read_json(manifest) if manifest.is_file() else {},
        dataset=DATASETS.get(opened.settings.data.dataset, opened.settings.data.dataset),
        licence=licence(opened.settings),
        words=words and len(words),
        parameters=sum(each.numel() for each in opened.generator.parameters()),
    )


def licence(settings: Settings) -> str:
    """What is known of the rights in the pictures that a model was trained on."""
    if settings.data.generated:
        return "The training pictures are drawn by ratlip itself (MIT); they are no one else's."
    if settings.data.dataset == "folder":
        return "The training pictures are the trainer's own: WRITE HERE whose they are and what they allow."
    source = import_module(f"ratlip.data.{settings.data.dataset}").SOURCE
    return f"The training pictures are not free: {source.licence} Check that before you pass the model on."


def _rows(scores: dict[str, Any]) -> list[list[str]]:
    """Score, generated, real, chance, as text."""
    real, labels, chance = (scores.get(name, {}) for name in ("real", "labels", "chance"))
    shares = [
        (f"{name} right", share, real["judge"][name], chance.get("judge", {}).get(name))
        for name, share in scores.get("judge", {}).items()
    ]
    shares += [(labels["judge_all"], scores["judge_all"], real["judge_all"], None)] if "judge_all" in scores else []
    rows = [[name, *(f"{100 * x:.1f} %" if x is not None else NONE for x in values)] for name, *values in shares]
    plain = [name for name in SCORES if scores.get(name) is not None and name != "judge_all"]
    return rows + [[labels.get(n, n), f"{scores[n]:.4g}", f"{real[n]:.4g}", NONE] for n in plain]


def _record(opened: Run, name: str) -> dict[str, Any]:
    path = opened.folder / name
    return read_json(path) if path.is_file() else {}


def _beside(folder: Path, settings: Settings, *more: str) -> Path:
    return Path(folder.resolve().parents[1], f"prepared-{settings.data_hash}", *more)


def _captions(opened: Run) -> list[str]:
    """Captions of the test split, evenly spaced, as in the run's sample grids."""
    home = _beside(opened.folder, opened.settings)
    if not (home / "manifest.json").is_file():
        raise RunError(f"{home}: is not there, so no caption for the sample grid; give one or more with --caption")
    return grid_captions(opened.settings, load_prepared(home).test)
