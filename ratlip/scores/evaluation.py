"""Scores of a finished run, each next to what real images get, without which none of them means much.

* CLIP similarity: mean cosine of image and caption embedding, by the CLIP of the training (it flatters: the generator
  learned to raise exactly this number), and by an independent one that it never saw.
* Frechet and kernel distance to real training images, inception score, precision and recall, in an extractor's
  features. `labels` holds the name to print: FID is what Inception gives, others are an FD.
* On a generated set, the share of captions that an attribute classifier finds in the image (`ratlip.scores.judge`);
  where captions name a part of the attributes, diversity of the rest and distances to fresh renders
  (`ratlip.scores.diversity`).

Images are made and read batch by batch into a `ratlip.data.store.Store`: an interrupted evaluation goes on where it
was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from ratlip.cache import digest, weights_digest
from ratlip.clip.frozen import FrozenClip, with_normalisation
from ratlip.clip.pairs import partial
from ratlip.data.batches import real_images
from ratlip.data.facts import UNNAMED, codes, coding, new, readings, says
from ratlip.data.prepared import Prepared
from ratlip.data.store import Store
from ratlip.errors import RunError, SettingsError
from ratlip.files import read_json, write_json
from ratlip.networks.losses import clip_similarity
from ratlip.scores.diversity import against_fresh, diversity_of
from ratlip.scores.extractors import Extractor, choose_extractor, fit
from ratlip.scores.judge import Judge, chance, judge_captions
from ratlip.scores.metrics import distances_and_diversity
from ratlip.settings import Settings
from ratlip.training.generation import generate, load_generator
from ratlip.training.step import sample_latents

TEST_LATENTS = 2**31  # a "step" that training never reaches: scores are not made from a latent of the training
PROTOCOLS = {  # settings of `evaluation` that have a name together; the extractor is named by each label
    "standard": dict(inception_range="standard", last_batch="keep", clip_score_normalisation="standard"),
    "published": dict(inception_range="published", last_batch="drop", clip_score_normalisation="published"),
}
PUBLISHED_PASSES = 12  # over the test captions: the other part of the published protocol


def protocol_settings(name: str, test_images: int) -> dict:
    """Overrides that set a protocol by its name, e.g. {"evaluation.last_batch": "drop", ...}.

    "published" (differences 4, 6 and 9) takes 12 passes over the `test_images` captions; "standard" sets no number.
    """
    found = {f"evaluation.{key}": value for key, value in PROTOCOLS[name].items()}
    return found | ({"evaluation.images": PUBLISHED_PASSES * test_images} if name == "published" else {})


def protocol_name(evaluation: BaseModel, test_images: int) -> str:
    """ "standard", "published", or "mixed" where the settings are some of each (or too few images)."""
    found = {f"evaluation.{key}": value for key, value in evaluation}
    return next((name for name in PROTOCOLS if protocol_settings(name, test_images).items() <= found.items()), "mixed")


def counted_images(settings: Settings) -> int:
    """How many images are generated: all, or those of full batches where `last_batch` is "drop", as published."""
    e = settings.evaluation
    count = e.images - (e.images % e.batch_size if e.last_batch == "drop" else 0)
    if not count:
        found = f"evaluation.images={e.images} at evaluation.batch_size={e.batch_size}"
        raise SettingsError(
            f"evaluation.last_batch=drop leaves none of {found}; lower the batch size, or keep the batch"
        )
    return count


def asked_split(settings: Settings, prepared: Prepared) -> Prepared:
    """The prepared data with the split that is scored (`evaluation.split`) as its test split."""
    if settings.evaluation.split == "test":
        return prepared
    if prepared.validation is None:
        mend = "set data.validation_images, or evaluation.split: test"
        raise SettingsError(f"evaluation.split=validation: {prepared.folder} has no such split; {mend}")
    return replace(prepared, test=prepared.validation)


def test_pairs(prepared: Prepared, count: int) -> tuple[np.ndarray, list[str]]:
    """Numbers (n,) of test images and one caption of each: the split in order, again and again; image i gives its
    caption i, then i + 1, ..., so that all wordings occur.
    """
    rounds, numbers = np.divmod(np.arange(count), len(prepared.test))
    captions = prepared.test.captions
    return numbers, [captions[i][(i + r) % len(captions[i])] for i, r in zip(numbers, rounds, strict=True)]


@torch.no_grad()
def embed(clip: FrozenClip, images: Tensor, batch_size: int = 128) -> Tensor:
    """Image embeddings (N,E), raw, on the CPU. Images of another size than the CLIP's are resized."""
    device, size = clip.mean.device, clip.image_size
    return torch.cat([clip.embed_images(fit(part.to(device), size)).float().cpu() for part in images.split(batch_size)])


class Instruments:
    """All that is read off an image for the scores: one row of `columns` for each image, on disk."""

    def __init__(
        self, settings: Settings, prepared: Prepared, clip: FrozenClip, second: FrozenClip | None, judge: Judge | None
    ):
        e, self.settings, self.prepared, self.judge = settings.evaluation, settings, prepared, judge
        self.extractor = choose_extractor(settings, prepared, clip, second)
        clips, way = {"clip_similarity": clip, "independent_similarity": second}, e.clip_score_normalisation
        # One normalisation for all runs, whatever each was trained with: runs are compared.
        self.clips = {score: with_normalisation(each, way) for score, each in clips.items() if each is not None}
        widths = self.extractor.widths
        self.columns: dict[str, tuple[tuple[int, ...], str]] = {n: ((w,), "float32") for n, w in widths.items()}
        self.columns |= {score: ((), "float32") for score in self.clips}
        if judge is not None:
            self.columns |= dict.fromkeys(("judge", "named"), ((len(judge.values),), "bool"))
            table = coding(judge.values)
            said = says(prepared.test, table)
            self.says = dict(zip(prepared.test.all_captions, said, strict=True))
            if partial(prepared.test):
                self.columns["new"] = ((), "bool")
                self.shown = readings(codes(prepared.train.attributes or [], table), table)
        self.identity = dict(
            extractor=self.extractor.key,
            data=prepared.manifest["content_sha256"],
            normalisation=way,
            batch_size=e.batch_size,
            clips={score: each.fingerprint for score, each in self.clips.items()},
            judge=weights_digest(judge) if judge is not None else None,
        )

    def read(self, images: Tensor, numbers: np.ndarray, captions: Sequence[str]) -> dict:
        """Images (B,3,S,S) in [-1,1] for these captions of the test images with these numbers (B,)."""
        found: dict[str, Any] = dict(self.extractor(images))
        for score, clip in self.clips.items():
            found[score] = clip_similarity(embed(clip, images), clip.embed_text(captions).cpu())
        if self.judge is not None:
            said = np.stack([self.says[caption] for caption in captions])
            found |= {"judge": judge_captions(self.judge, images, said), "named": said != UNNAMED}
            if "new" in self.columns:
                found["new"] = new(said, self.shown)
        return found

    def scores(self, store: Store, reference: Store) -> dict:
        """All scores of a complete store against the features of the reference."""
        found: dict = {score: round(float(np.mean(store[score], dtype=np.float64)), 4) for score in self.clips}
        found.setdefault("independent_similarity", None)
        found |= distances_and_diversity(store["features"], store["logits"], reference["features"])
        if self.judge is not None:
            right, named = np.asarray(store["judge"]), store["named"]
            shares = (right & named).sum(0) / np.maximum(named.sum(0), 1)  # of those whose caption names it
            found["judge"] = {n: round(float(share), 4) for n, share in zip(self.judge.values, shares, strict=True)}
            whole = right.all(axis=1)
            found["judge_all"] = round(float(np.mean(whole)), 4)
            if "new" in self.columns and store["new"].any():  # captions that are true of no training image
                found["judge_new"] = round(float(np.mean(np.asarray(whole)[store["new"]])), 4)
                found["new_captions"] = int(store["new"].sum())
        return found

    def labels(self) -> dict[str, str]:
        """What to print for each score: its name, and whose it is."""
        labels = {}
        for score, clip in self.clips.items():
            kind = "trained with" if score == "clip_similarity" else "independent"
            published = ", published normalisation" if clip.normalisation == "published" else ""
            labels[score] = f"CLIP similarity ({clip.name}, {kind}{published})"
        labels |= {score: self.extractor.label(score) for score in self.extractor.names}
        return labels | ({"judge_all": "all attributes right (judge)"} if self.judge is not None else {})


def reference_numbers(prepared: Prepared, images: int) -> np.ndarray:
    """Training images of the reference: four times as many as are scored, spread evenly over the split."""
    return np.linspace(0, len(prepared.train) - 1, min(4 * images, len(prepared.train))).astype(int)


def reference_store(
    root: Path,
    settings: Settings,
    prepared: Prepared,
    extractor: Extractor,
    numbers: np.ndarray,
    progress: bool,
    *,
    split: str = "train",
) -> Store:
    """Features of real images (centre crops), computed once for a workspace and kept in its folder `root`."""
    crop, size = settings.data.crop, settings.model.image_size
    identity = dict(extractor=extractor.features_key, data=prepared.manifest["content_sha256"], split=split, crop=crop)
    identity |= dict(image_size=size, numbers=digest(numbers.tolist()))
    store = Store(root, "features", identity, len(numbers), {"features": ((extractor.widths["features"],), "float32")})

    def read(rows: np.ndarray) -> dict:
        return extractor(real_images(prepared[split], numbers[rows], crop, size))

    return store.fill(read, settings.evaluation.batch_size, desc=f"real {split} images", progress=progress)


def evaluate(
    folder: str | Path,
    settings: Settings,
    prepared: Prepared,
    clip: FrozenClip,
    judge: Judge | None = None,
    *,
    independent: FrozenClip | None = None,
    root: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """All scores of the run in `folder` as one dict of plain numbers; `real` holds those of real test images.

    Test captions in order, one image each from a latent that follows from the run's seed; the reference are training
    images. `root`: the folder of the workspace, where features of real images are kept (default: two folders above the
    run). `seconds_per_image` is the time of generating, on the device at hand. Without an independent CLIP,
    `independent_similarity` is None and the extractor is `clip`. Real images are counted once each, so there may be
    fewer of them: a distance falls as the number grows.
    """
    folder, root = Path(folder), Path(root) if root else Path(folder).resolve().parents[1]
    prepared = asked_split(settings, prepared)
    count, instruments = counted_images(settings), Instruments(settings, prepared, clip, independent, judge)
    numbers = reference_numbers(prepared, count)
    reference = reference_store(root, settings, prepared, instruments.extractor, numbers, progress)
    store = _read_generated(folder, clip, instruments, count, progress)
    found = instruments.scores(store, reference)
    real = _real_scores(root, instruments, reference, count, progress)
    seconds = float(np.sum(store["seconds"], dtype=np.float64))
    more = _scores_of_z(folder, root, clip, instruments, store, progress) if partial(prepared.test) else {}
    shutil.rmtree(store.folder)
    scores = {
        "run": folder.name,
        "variant": settings.model.variant,
        "seed": settings.seed,
        "images": count,
        "protocol": protocol_name(settings.evaluation, len(prepared.test)),
        "extractor": instruments.extractor.name,
        "reference": f"{reference.rows} training images",
        "seconds_per_image": round(seconds / count, 5),
        **found,
        **more,
        "labels": instruments.labels(),
        "real": real,
    }
    if judge is not None:
        scores["chance"] = {"judge": {name: round(share, 4) for name, share in chance(judge.values).items()}}
    return scores


def _read_generated(folder: Path, clip: FrozenClip, instruments: Instruments, count: int, progress: bool) -> Store:
    """Generate, read, forget, batch by batch; what was read goes to `<folder>/evaluation-<hash>`."""
    settings, (numbers, captions) = instruments.settings, test_pairs(instruments.prepared, count)
    generator = load_generator(folder, settings, clip)
    latent = sample_latents(settings.seed, TEST_LATENTS, count, settings.model.latent_size)

    def read(rows: np.ndarray) -> dict:
        texts = [captions[i] for i in rows]
        sentence = clip.embed_text(texts).cpu()
        start = time.perf_counter()
        images = generate(generator, latent[rows], sentence, len(rows))
        seconds = (time.perf_counter() - start) / len(rows)
        if not bool(images.isfinite().all()):
            raise RunError(f"{folder}: its generator draws pixels that are not finite; delete the run to train it anew")
        return {**instruments.read(images, numbers[rows], texts), "seconds": np.full(len(rows), seconds)}

    identity = {**instruments.identity, "generator": weights_digest(generator), "seed": settings.seed}
    store = Store(folder, "evaluation", identity, count, instruments.columns | {"seconds": ((), "float32")})
    return store.fill(read, settings.evaluation.batch_size, desc="evaluate", progress=progress)


def _scores_of_z(
    folder: Path, root: Path, clip: FrozenClip, instruments: Instruments, store: Store, progress: bool
) -> dict:
    """Where captions name a part: `fresh`, distances to new renders of the test captions, and `diversity` over z."""
    settings, prepared, judge = instruments.settings, instruments.prepared, instruments.judge
    if judge is None:
        return {}
    said = np.stack([instruments.says[caption] for caption in test_pairs(prepared, store.rows)[1]])
    cut = dict(crop=settings.data.crop, image_size=settings.model.image_size)
    near = against_fresh(root, instruments.extractor, store, prepared, said, **cut, progress=progress)
    generator = load_generator(folder, settings, clip)
    how: dict[str, Any] = dict(split=settings.evaluation.split, root=root)
    return {"fresh": near, "diversity": diversity_of(generator, clip, prepared, judge, settings, **how)}


def _real_scores(root: Path, instruments: Instruments, reference: Store, count: int, progress: bool) -> dict:
    """The same scores of real test images, each counted once: computed once for a workspace."""
    settings, prepared = instruments.settings, instruments.prepared
    crop, size, count = settings.data.crop, settings.model.image_size, min(count, len(prepared.test))
    numbers, captions = test_pairs(prepared, count)

    def read(rows: np.ndarray) -> dict:
        images = real_images(prepared.test, numbers[rows], crop, size)
        return instruments.read(images, numbers[rows], [captions[i] for i in rows])

    identity = {**instruments.identity, "split": settings.evaluation.split, "crop": crop, "image_size": size}
    store = Store(root, "features", identity, count, instruments.columns)
    store.fill(read, settings.evaluation.batch_size, desc="real test images", progress=progress)
    path = store.folder / f"scores-{reference.folder.name}.json"
    if not path.is_file():
        write_json(path, {"images": count, **instruments.scores(store, reference)})
    return read_json(path)
