"""Scores in which the latent z counts: what many images of one caption have in common, beside the data.

A caption that names a part of the attributes leaves the rest to z. The data answer it with every value; a generator
that has stopped to listen to z always draws the same one. So the attributes that a caption does not name are read off
its images by the judge, and off as many fresh renders that the caption is true of: entropy and coverage of each, and
their ratio (1: as the data; 0: z is ignored). Pixels spread inside a caption beside those of the renders.

Distances against training images count it as an error that the test captions ask for other combinations: real test
images themselves got 0.61 of the main run's 0.70. `against_fresh` measures against new renders of the same captions,
and gives what other new renders get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ratlip.cache import digest, weights_digest
from ratlip.clip.frozen import FrozenClip
from ratlip.data import facts
from ratlip.data.generated import GeneratedSet, generated_set
from ratlip.data.prepared import Prepared, Split
from ratlip.data.store import Store
from ratlip.errors import DataError
from ratlip.files import read_json, write_json
from ratlip.scores.judge import Judge, best_readings, judge_codes
from ratlip.scores.metrics import distances_and_diversity
from ratlip.settings import Settings
from ratlip.training.generation import generate
from ratlip.training.step import sample_latents

LATENTS, BLOCK, OWN_LATENTS = 64, 256, 2**31 + 1  # the last: a "step" of latents that nothing else takes
REAL, REFERENCE, FLOOR = 101, 102, 103  # seeds of fresh renders: each of the three has its own


def open_captions(split: Split, made: GeneratedSet, count: int) -> np.ndarray:
    """Rows of `split.all_captions` that leave an attribute open, `count` at most, spread evenly over them: int (n,).

    DataError where captions name all: then nothing is left to z that a judge can read.
    """
    rows = np.flatnonzero((facts.says(split, made.table) == facts.UNNAMED).any(axis=1))
    if not len(rows):
        raise DataError(f"{split.folder}: its captions name every attribute; prepare it with data.named: subset")
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def entropies(found: np.ndarray, values: int) -> tuple[float, float]:
    """Entropy of value numbers (L,), as a share of its largest, and the share of `values` that occur (both 0 to 1).

    Where the judge found no object (UNNAMED) nothing is known: such images are left out. None at all gives 0, 0.
    """
    counts = np.bincount(found[found != facts.UNNAMED], minlength=values)
    if not (total := counts.sum()):
        return 0.0, 0.0
    share, most = counts[counts > 0] / total, min(values, len(found))
    return float(-(share * np.log(share)).sum() / np.log(most)) if most > 1 else 0.0, float((counts > 0).sum() / most)


def spread_inside(images: Tensor) -> float:
    """Root mean square distance a pixel of images (L,3,S,S), or a feature of (L,E), from their mean (unbiased)."""
    return float(images.flatten(1).double().var(dim=0).mean().sqrt())


def diversity(
    images_of: Callable[[int], Tensor],
    judge: Judge,
    made: GeneratedSet,
    says: np.ndarray,
    *,
    crop: int,
    image_size: int,
    latents: int = LATENTS,
    root: str | Path | None = None,
) -> dict:
    """What the images of captions have in common, beside `latents` fresh renders of each.

    `images_of(i)`: images (latents,3,S,S) in [-1,1] of the caption whose row of `says` (captions,K) is i. Returns, for
    "generated" and "real": `right` (share of images in which all that is named is right), `object` (share in which the
    gate finds one), `spread` (of pixels inside a caption), `entropy` and `coverage` (means over captions and what each
    leaves open), `attributes` ({name: {"entropy", "coverage"}}, None where no caption leaves it open); and
    "ratio" of entropy, coverage and spread, generated / real. `root`: a folder where "real" is kept for the next time.
    """
    identity = [made.module.__name__, made.used, made.resize, crop, image_size, latents, says.tolist()]
    kept = Path(root or ".") / f"diversity-{digest([*identity, weights_digest(judge)])}.json"

    def real(i: int) -> Tensor:
        numbers = range(i * latents, (i + 1) * latents)
        rows = np.repeat(says[i : i + 1], latents, axis=0)
        return made.fresh(rows, REAL, crop=crop, image_size=image_size, numbers=numbers)[0]

    data = read_json(kept) if root and kept.is_file() else _described(real, judge, made, says)
    if root:
        write_json(kept, data)
    found = {"generated": _described(images_of, judge, made, says), "real": data}
    names = ("entropy", "coverage", "spread")
    ratio = {name: _share(found["generated"][name], found["real"][name]) for name in names}
    return {"captions": len(says), "latents": latents, **found, "ratio": ratio}


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _described(images_of: Callable[[int], Tensor], judge: Judge, made: GeneratedSet, says: np.ndarray) -> dict:
    right, there, spread, rows = [], [], [], []
    for number, said in enumerate(says):
        images = images_of(number)
        found, agreed = best_readings(judge_codes(judge, images), np.tile(said, (len(images), 1)), made.values)
        right.append(agreed.all(axis=1).mean())
        there.append((found != facts.UNNAMED).all(axis=1).mean())
        spread.append(spread_inside(images) ** 2)
        for column, (name, values) in enumerate(made.table.items()):
            if said[column] == facts.UNNAMED:
                rows.append((name, *entropies(found[:, column], len(values))))
    own = {name: [row[1:] for row in rows if row[0] == name] for name in made.table}
    scores = ("entropy", "coverage")

    def means(part: Sequence) -> dict[str, float]:
        return dict(zip(scores, (round(float(each), 4) for each in np.mean(part, axis=0)), strict=True))

    return {
        "right": round(float(np.mean(right)), 4),
        "object": round(float(np.mean(there)), 4),
        "spread": round(float(np.sqrt(np.mean(spread))), 5),
        **means([row[1:] for row in rows]),
        "attributes": {name: means(part) if part else None for name, part in own.items()},
    }


def diversity_of(
    generator: nn.Module,
    clip: FrozenClip,
    prepared: Prepared,
    judge: Judge,
    settings: Settings,
    *,
    split: str = "test",
    captions: int = 32,
    root: str | Path | None = None,
) -> dict:
    """`diversity` of a generator: captions of a split that leave something open, the same latents for each of them."""
    made, part = generated_set(prepared), prepared[split]
    rows = open_captions(part, made, captions)
    sentences = clip.embed_text([part.all_captions[row] for row in rows]).cpu()
    latent = sample_latents(settings.seed, OWN_LATENTS, LATENTS, settings.model.latent_size)

    def images_of(i: int) -> Tensor:
        return generate(generator, latent, sentences[i : i + 1].expand(LATENTS, -1))

    says = facts.says(part, made.table)[rows]
    cut = dict(crop=settings.data.crop, image_size=settings.model.image_size)
    return diversity(images_of, judge, made, says, root=root, **cut)


def against_fresh(
    root: str | Path,
    extractor: Any,
    generated: Mapping[str, Any] | Store,
    prepared: Prepared,
    says: np.ndarray,
    *,
    crop: int,
    image_size: int,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Distances of generated images of captions to fresh renders of the same captions, and what other renders get.

    `generated`: "features" (N,E) and "logits" (N,C) of the images that were made for `says` (N,K), one for each, as
    `extractor` (an `extractors.Extractor`) gives them. Returns "generated" and "real" (the floor: other renders of
    these captions, as many), each with the scores of `metrics.distances_and_diversity`. The renders' features are
    computed once and kept in `root`.
    """
    made, widths = generated_set(prepared), extractor.widths
    columns: dict[str, tuple[tuple[int, ...], str]] = {name: ((width,), "float32") for name, width in widths.items()}
    identity = dict(extractor=extractor.key, data=prepared.manifest["content_sha256"], crop=crop, size=image_size)
    identity |= dict(says=digest(says.tolist()))
    found = {}
    for seed in (REFERENCE, FLOOR):

        def read(rows: np.ndarray, seed: int = seed) -> dict:
            images, _ = made.fresh(says[rows], seed, crop=crop, image_size=image_size, numbers=rows.tolist())
            return extractor(images)

        store = Store(root, "fresh", {**identity, "seed": seed}, len(says), columns)
        found[seed] = store.fill(read, BLOCK, desc="fresh renders", progress=progress)
    sets, reference = {"generated": generated, "real": found[FLOOR]}, found[REFERENCE]["features"]
    return {name: distances_and_diversity(each["features"], each["logits"], reference) for name, each in sets.items()}
