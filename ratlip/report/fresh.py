"""`ratlip profile new`: a first profile for a folder of one's own, each size with its reason in a comment.

On a CPU the networks are the demo's; with a GPU they draw at 64 px and are wider. Patches are of 4 px: their 48
numbers go into more channels than that (a CLIP that cannot hold its patches lets the generator draw in squares).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from ratlip.data import folder
from ratlip.errors import SettingsError
from ratlip.files import write_text
from ratlip.report.html import TEMPLATES
from ratlip.settings import Settings, load_settings

SECONDS_A_STEP = 0.2  # of the form for a CPU, on two cores
MINUTES = 20  # of the main run on a CPU
PASSES = 300  # over the training pictures; after more, a small set is known by heart
FEW = 1000  # training pictures
SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def new(data: str | Path, path: str | Path) -> Settings:
    """Look at the folder `data`, write a profile for it to `path`, and return its settings.

    DataError lists all that is wrong with the folder; SettingsError where `path` is there already, or is no .yaml.
    """
    path, gpu = Path(path), torch.cuda.is_available()
    if path.suffix not in (".yaml", ".yml") or path.exists():
        wrong = "is there already; delete it, or name another" if path.exists() else "should end in .yaml"
        raise SettingsError(f"{path}: {wrong} (-o FILE.yaml)")
    records = folder.read(data)
    train, test = (sum(record.split == split for record in records) for split in ("train", "test"))
    captions = [caption for record in records for caption in record.captions]
    write_text(path, profile(Path(data).resolve().name, train, test, captions, gpu) + "\n")
    return load_settings(path)


def profile(name: str, train: int, test: int, captions: list[str], gpu: bool) -> str:
    """The profile as commented YAML, for so many pictures of each split with these captions."""
    batch, clip_batch = (max(2, min(most, train // 2)) for most in (32 if gpu else 16, 64))
    budget = 20_000 if gpu else int(MINUTES * 60 / SECONDS_A_STEP)
    steps = max(500, min(budget, PASSES * train // batch) // 100 * 100)
    lengths = sorted(len(caption.split()) for caption in captions)
    words = lengths[int(0.95 * (len(lengths) - 1))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return TEMPLATES.get_template("own.yaml.j2").render(
        name=name,
        train=train,
        test=test,
        few=train < FEW,
        gpu=gpu,
        machine="a GPU" if gpu else f"{cores} CPU cores",
        px=64 if gpu else 32,
        width=96 if gpu else 64,
        batch=batch,
        steps=steps,
        minutes=steps * SECONDS_A_STEP / 60,
        seen=steps * batch / train,
        words=words,
        context=min(64, max(8, words + 2)),
        sided=sum(bool(SIDES.search(caption)) for caption in captions),
        clip_batch=clip_batch,
        clip_steps=max(200, min(2000 if gpu else 800, 30 * train // clip_batch)),
        images=max(64, min(2048 if gpu else 512, test)),
    )
