"""Scores of a finished run, each next to what real images get, without which none of them means much.

* CLIP similarity: mean cosine of image and caption embedding, by the CLIP that the generator was trained
  with. It flatters: the generator learned to raise exactly this number. Hence also by an independent CLIP,
  which the generator never saw.
* Frechet and kernel distance to real training images, inception score, precision and recall
  (`ratlip.scores`), in the features of the extractor that the settings name (`ratlip.scores.extractors`). `labels`
  holds the name to print: FID is what Inception gives, with another extractor it is an FD and says so.
* On the generated set, the share of captions whose object, colour, size, place and background a classifier
  trained on real images alone finds in the generated image (`ratlip.scores.judge`).

Images are made and read batch by batch, and what is read off them goes to disk (`ratlip.cache`): memory
does not grow with their number, and an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from ratlip.cache import Store, digest, weights_digest
from ratlip.clip.frozen import FrozenClip, with_normalisation
from ratlip.data.batches import real_images
from ratlip.errors import SettingsError
from ratlip.files import read_json, write_json
from ratlip.networks.losses import clip_similarity
from ratlip.scores.extractors import Extractor, choose_extractor, fit
from ratlip.scores.judge import Judge, chance, judge_right
from ratlip.scores.metrics import frechet_distance as frechet_distance  # part of this module's interface
from ratlip.scores.metrics import quality
from ratlip.settings import Settings
from ratlip.training.generation import generate, load_generator
from ratlip.training.step import sample_latents

TEST_LATENTS = 2**31  # a "step" that training never reaches: scores are not made from a latent of the training
PROTOCOLS = {  # settings of `evaluation` that have a name together; the extractor is named by each label
    "standard": {"inception_range": "standard", "last_batch": "keep", "clip_score_normalisation": "standard"},
    "published": {
        "inception_range": "published",
        "last_batch": "drop",
        "clip_score_normalisation": "published",
    },  # and 12 passes over the test captions
}
PUBLISHED_PASSES = 12


@torch.no_grad()
def embed(clip: FrozenClip, images: Tensor, batch_size: int = 128) -> Tensor:
    """Image embeddings (N,E), raw, on the CPU. Images of another size than the CLIP's are resized."""
    return torch.cat(
        [
            clip.embed_images(fit(part.to(clip.mean.device), clip.image_size)).float().cpu()
            for part in images.split(batch_size)
        ]
    )


def test_pairs(prepared, count: int) -> tuple[np.ndarray, list[str]]:
    """Numbers (n,) of test images and one caption of each.

    The split in order, again and again; image i gives its caption i, then i + 1, ..., so that all wordings
    occur.
    """
    numbers = np.arange(count) % len(prepared.test)
    rounds = np.arange(count) // len(prepared.test)
    captions = prepared.test.captions
    return numbers, [captions[i][(i + r) % len(captions[i])] for i, r in zip(numbers, rounds)]


def protocol_settings(name: str, test_images: int) -> dict:
    """Overrides that set a protocol by its name, e.g. {"evaluation.last_batch": "drop", ...}.

    "published" as in official.md (evaluation, rows 4, 6 and 9): 12 passes over the `test_images` captions.
    "standard" leaves the number of images to the profile; distances of different numbers do not compare.
    """
    found = {f"evaluation.{key}": value for key, value in PROTOCOLS[name].items()}
    return found | ({"evaluation.images": PUBLISHED_PASSES * test_images} if name == "published" else {})


def protocol_name(evaluation, test_images: int) -> str:
    """ "standard", "published", or "mixed" where the settings are some of each (or too few images)."""
    for name in PROTOCOLS:
        wanted = protocol_settings(name, test_images)
        if all(getattr(evaluation, key.partition(".")[2]) == value for key, value in wanted.items()):
            return name
    return "mixed"


def counted_images(settings: Settings) -> int:
    """How many images are generated: `evaluation.images`, without the last batch where it is not full and the
    published protocol drops it (official.md, row 9).
    """
    e = settings.evaluation
    count = e.images - (e.images % e.batch_size if e.last_batch == "drop" else 0)
    if not count:
        raise SettingsError(
            f"evaluation.last_batch=drop leaves none of evaluation.images={e.images} at "
            f"evaluation.batch_size={e.batch_size}; lower the batch size, or keep the batch"
        )
    return count


class Instruments:
    """All that is read off an image for the scores. One row of `columns` for each image, on disk."""

    def __init__(
        self, settings: Settings, prepared, clip: FrozenClip, independent: FrozenClip | None, judge: Judge | None
    ):
        self.extractor: Extractor = choose_extractor(settings, prepared, clip, independent)
        self.clips = {"clip_similarity": clip} | (
            {"independent_similarity": independent} if independent is not None else {}
        )
        way = settings.evaluation.clip_score_normalisation  # whatever a run was trained with: runs are compared
        self.clips = {score: with_normalisation(each, way) for score, each in self.clips.items()}
        self.judge, self.attributes = judge, list(chance()) if judge is not None else []
        self.columns = {name: ((width,), "float32") for name, width in self.extractor.widths.items()}
        self.columns |= {score: ((), "float32") for score in self.clips}
        self.columns |= {"judge": ((len(self.attributes),), "bool")} if judge is not None else {}
        self.identity = {
            "extractor": self.extractor.key,
            "data": prepared.manifest["content_sha256"],
            "normalisation": settings.evaluation.clip_score_normalisation,
            "batch_size": settings.evaluation.batch_size,
            "clips": {score: each.fingerprint for score, each in self.clips.items()},
            "judge": weights_digest(judge) if judge is not None else None,
        }

    def read(self, images: Tensor, captions: Sequence[str], attributes: list[dict] | None) -> dict:
        """Images (B,3,S,S) in [-1,1], their captions, and their true attributes where these are known."""
        found = self.extractor(images)
        for score, clip in self.clips.items():
            found[score] = clip_similarity(embed(clip, images), clip.embed_text(captions).cpu())
        if self.judge is not None:
            right = judge_right(self.judge, images, attributes)
            found["judge"] = torch.stack([right[name] for name in self.attributes], dim=1)
        return found

    def scores(self, store: Store, reference: Store) -> dict:
        """All scores of a complete store against the features of the reference."""
        found = {score: round(float(np.mean(store[score], dtype=np.float64)), 4) for score in self.clips}
        found.setdefault("independent_similarity", None)
        found |= quality(store["features"], store["logits"], reference["features"])
        if self.judge is not None:
            right = store["judge"]
            found["judge"] = {name: round(float(share), 4) for name, share in zip(self.attributes, right.mean(axis=0))}
            found["judge_all"] = round(float(right.all(axis=1).mean()), 4)
        return found

    def labels(self) -> dict[str, str]:
        """What to print for each score: its name, and whose it is."""
        kinds = {"clip_similarity": "trained with", "independent_similarity": "independent"}
        labels = {
            score: f"CLIP similarity ({clip.name}, {kinds[score]}"
            f"{', published normalisation' * (clip.normalisation == 'published')})"
            for score, clip in self.clips.items()
        }
        labels |= {score: self.extractor.label(score) for score in self.extractor.names}
        return labels | ({"judge_all": "all attributes right (judge)"} if self.judge is not None else {})


def reference_numbers(prepared, images: int) -> np.ndarray:
    """Training images of the reference: four times as many as are scored, spread evenly over the split."""
    return np.linspace(0, len(prepared.train) - 1, min(4 * images, len(prepared.train))).astype(int)


def reference_store(
    home: Path,
    settings: Settings,
    prepared,
    extractor: Extractor,
    numbers: np.ndarray,
    progress: bool,
    *,
    split: str = "train",
) -> Store:
    """Features of real images (centre crops), computed once for a workspace and kept in it."""
    crop, size, source = settings.data.crop, settings.model.image_size, prepared[split]
    identity = {
        "extractor": extractor.features_key,
        "data": prepared.manifest["content_sha256"],
        "split": split,
        "crop": crop,
        "image_size": size,
        "numbers": digest(numbers.tolist()),
    }
    store = Store(home, "features", identity, len(numbers), {"features": ((extractor.widths["features"],), "float32")})

    def read(rows: np.ndarray) -> dict:
        return extractor(real_images(source, numbers[rows], crop, size))

    return store.fill(read, settings.evaluation.batch_size, desc=f"real {split} images", progress=progress)


def _real_scores(
    home: Path, settings: Settings, prepared, instruments: Instruments, reference: Store, count: int, progress: bool
) -> dict:
    """The same scores of real test images, each counted once: computed once for a workspace."""
    count = min(count, len(prepared.test))
    numbers, captions = test_pairs(prepared, count)
    crop, size, attributes = settings.data.crop, settings.model.image_size, prepared.test.attributes
    identity = {**instruments.identity, "split": "test", "crop": crop, "image_size": size}
    store = Store(home, "features", identity, count, instruments.columns)

    def read(rows: np.ndarray) -> dict:
        truth = attributes and [attributes[i] for i in numbers[rows]]
        return instruments.read(
            real_images(prepared.test, numbers[rows], crop, size), [captions[i] for i in rows], truth
        )

    store.fill(read, settings.evaluation.batch_size, desc="real test images", progress=progress)
    path = store.folder / f"scores-{reference.folder.name}.json"
    if not path.is_file():
        write_json(path, {"images": count, **instruments.scores(store, reference)})
    return read_json(path)


def evaluate(
    folder: str | Path,
    settings: Settings,
    prepared,
    clip: FrozenClip,
    judge: Judge | None = None,
    *,
    independent: FrozenClip | None = None,
    home: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """All scores of the run in `folder` as one dict of plain numbers; `real` holds those of real test images.

    Test captions in order, one image each from latent that follows from the run's seed; the reference of the
    distances are training images, spread evenly over the split. `home`: the workspace, where features of real
    images are kept (default: two folders above the run). Images are not kept, and what was read off the
    generated ones goes when the scores are made. `seconds_per_image` is the time of generating, on the device
    at hand. Without an independent CLIP, `independent_similarity` is None and the extractor is `clip`.
    Real images are counted once each, so there may be fewer of them: a distance falls as the number grows.
    """
    folder, home = Path(folder), Path(home) if home else Path(folder).resolve().parents[1]
    count = counted_images(settings)
    instruments = Instruments(settings, prepared, clip, independent, judge)
    reference = reference_store(
        home, settings, prepared, instruments.extractor, reference_numbers(prepared, count), progress
    )
    store = _read_generated(folder, settings, prepared, clip, instruments, count, progress)
    found = instruments.scores(store, reference)
    real = _real_scores(home, settings, prepared, instruments, reference, count, progress)
    seconds = float(np.sum(store["seconds"], dtype=np.float64))
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
        "labels": instruments.labels(),
        "real": real,
    }
    if judge is not None:
        scores["chance"] = {"judge": {name: round(share, 4) for name, share in chance().items()}}
    return scores


def _read_generated(
    folder: Path, settings: Settings, prepared, clip: FrozenClip, instruments: Instruments, count: int, progress: bool
) -> Store:
    """Generate, read, forget, batch by batch; what was read goes to `<folder>/evaluation-<hash>`."""
    generator = load_generator(folder, settings, clip)
    numbers, captions = test_pairs(prepared, count)
    latent = sample_latents(settings.seed, TEST_LATENTS, count, settings.model.latent_size)
    attributes = prepared.test.attributes

    def read(rows: np.ndarray) -> dict:
        said = [captions[i] for i in rows]
        sentence = clip.embed_text(said).cpu()
        start = time.perf_counter()
        images = generate(generator, latent[rows], sentence, len(rows))
        seconds = (time.perf_counter() - start) / len(rows)
        found = instruments.read(images, said, attributes and [attributes[i] for i in numbers[rows]])
        return {**found, "seconds": np.full(len(rows), seconds)}

    identity = {**instruments.identity, "generator": weights_digest(generator), "seed": settings.seed}
    store = Store(folder, "evaluation", identity, count, instruments.columns | {"seconds": ((), "float32")})
    return store.fill(read, settings.evaluation.batch_size, desc="evaluate", progress=progress)
