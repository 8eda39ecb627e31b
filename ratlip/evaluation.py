"""Scores of a finished run, each next to what real images get, without which none of them means much.

* CLIP similarity: mean cosine of image and caption embedding, by the CLIP that the generator was trained
  with. It flatters: the generator learned to raise exactly this number.
* Frechet distance in that CLIP's image space, `FD (<clip>)`. It is not FID, which is defined by Inception's
  features (and needs its weights); it compares runs that share a CLIP, and nothing else.
* On the generated set, the share of captions whose object, colour, size, place and background a classifier
  trained on real images alone finds in the generated image (`ratlip.judge`).
"""
from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from ratlip.clip import FrozenClip
from ratlip.config import Settings
from ratlip.data.batches import real_images
from ratlip.errors import RunError
from ratlip.files import read_json
from ratlip.judge import Judge, chance, judge_right
from ratlip.losses import clip_similarity
from ratlip.progress import bar
from ratlip.training import build_networks, noise_for, read_checkpoint

TEST_NOISE = 2**31  # a "step" that training never reaches: scores are not made from a noise of the training


def load_generator(folder: str | Path, settings: Settings, clip: FrozenClip):
    """The run's generator as of its last checkpoint (its moving average where there is one), in eval mode."""
    device, identity = clip.mean.device, Path(folder) / "identity.json"
    trained_with = read_json(identity)["clip"] if identity.is_file() else clip.fingerprint
    if trained_with != clip.fingerprint:
        raise RunError(f"{folder}: was trained with the CLIP {trained_with}, not with {clip.name} "
                       f"({clip.fingerprint}), which would draw noise; give the folder of its own CLIP")
    networks = read_checkpoint(Path(folder) / "checkpoint.pt", device)["networks"]
    with torch.random.fork_rng(devices=[]):  # the fresh weights are overwritten, unnoticed by the caller
        generator, _ = build_networks(settings, clip)
    if "average" in networks:
        state = {key.removeprefix("module."): value for key, value in networks["average"].items()
                 if key != "n_averaged"}
    else:
        state = networks["generator"]
    generator.load_state_dict(state)
    return generator.to(device).eval()


@torch.no_grad()
def generate(generator, noise: Tensor, sentence: Tensor, batch_size: int = 64,
             progress: bool = False) -> Tensor:
    """Images (N,3,S,S) clamped to [-1,1] on the CPU for noise (N,Z) and sentences (N,E), in batches."""
    device = next(generator.parameters()).device
    batches = list(zip(noise.split(batch_size), sentence.split(batch_size), strict=True))
    return torch.cat([generator(z.to(device), s.to(device)).clamp(-1, 1).float().cpu()
                      for z, s in bar(batches, desc="generate", unit="batch", enabled=progress)])


@torch.no_grad()
def embed(clip: FrozenClip, images: Tensor, batch_size: int = 128) -> Tensor:
    """Image embeddings (N,E), raw, on the CPU."""
    return torch.cat([clip.embed_images(part.to(clip.mean.device)).float().cpu()
                      for part in images.split(batch_size)])


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of features (N,E) and (M,E), by torch-fidelity's formula."""
    a, b = (fid_features_to_statistics(features.double()) for features in (first, second))
    return float(fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"])


def test_pairs(prepared, count: int) -> tuple[np.ndarray, list[str]]:
    """Numbers (n,) of test images and one caption of each.

    The split in order, again and again; image i gives its caption i, then i + 1, ..., so that all wordings
    occur.
    """
    numbers = np.arange(count) % len(prepared.test)
    rounds = np.arange(count) // len(prepared.test)
    captions = prepared.test.captions
    return numbers, [captions[i][(i + r) % len(captions[i])] for i, r in zip(numbers, rounds)]


class Tally:
    """Collects what the scores need of images that come in batches: embeddings, the judge's findings."""

    def __init__(self, clip: FrozenClip, judge: Judge | None):
        self.clip, self.judge = clip, judge
        self.embeddings: list[Tensor] = []
        self.right: dict[str, list[Tensor]] = {}

    def add(self, images: Tensor, attributes: list[dict] | None = None) -> None:
        """Images (B,3,S,S) in [-1,1]; their true attributes where they are known."""
        self.embeddings.append(embed(self.clip, images))
        if self.judge is not None and attributes is not None:
            for name, hits in judge_right(self.judge, images, attributes).items():
                self.right.setdefault(name, []).append(hits)

    def scores(self, sentence: Tensor, reference: Tensor) -> dict:
        """CLIP similarity to `sentence` (N,E), Frechet distance to `reference` (M,E), the judge's shares."""
        embedding = torch.cat(self.embeddings)
        scores = {"clip_similarity": round(float(clip_similarity(embedding, sentence).mean()), 4),
                  "frechet_distance": round(frechet_distance(embedding, reference), 4)}
        if self.right:
            scores["judge"] = {name: round(float(torch.cat(hits).float().mean()), 4)
                               for name, hits in self.right.items()}
        return scores


def evaluate(folder: str | Path, settings: Settings, prepared, clip: FrozenClip, judge: Judge | None = None,
             *, progress: bool = True) -> dict:
    """All scores of the run in `folder` as one dict of plain numbers; `real` holds those of real test images.

    Test captions in order, one image each from noise that follows from the run's seed; the reference of the
    Frechet distance are training images, spread evenly over the split. Images are not kept.
    `seconds_per_image` is the time of generating, on the device at hand. CLIP scores with its own, standard
    normalisation whatever the run was trained with, so that runs can be compared.
    """
    e, crop, size = settings.evaluation, settings.data.crop, settings.model.image_size
    numbers, captions = test_pairs(prepared, e.images)
    sentence = clip.embed_text(captions).cpu()
    noise = noise_for(settings.seed, TEST_NOISE, len(captions), settings.model.noise_size)
    generator = load_generator(folder, settings, clip)
    clip = copy.copy(clip)
    clip.normalisation = "standard"

    fake, real, seconds = Tally(clip, judge), Tally(clip, judge), 0.0
    batches = torch.arange(len(numbers)).split(e.batch_size)
    for rows in bar(batches, desc="evaluate", unit="batch", enabled=progress):
        attributes = prepared.test.attributes and [prepared.test.attributes[i] for i in numbers[rows]]
        start = time.perf_counter()
        images = generate(generator, noise[rows], sentence[rows], e.batch_size)
        seconds += time.perf_counter() - start
        fake.add(images, attributes)
        real.add(real_images(prepared.test, numbers[rows], crop, size), attributes)

    count = min(4 * e.images, len(prepared.train))
    spread = np.linspace(0, len(prepared.train) - 1, count).astype(int)
    reference = torch.cat([embed(clip, real_images(prepared.train, rows, crop, size))
                           for rows in np.array_split(spread, -(-count // e.batch_size))])
    scores = {"run": Path(folder).name, "arm": settings.model.arm, "seed": settings.seed,
              "images": len(numbers), "extractor": clip.name, "reference": f"{count} training images",
              "seconds_per_image": round(seconds / len(numbers), 5),
              **fake.scores(sentence, reference), "real": real.scores(sentence, reference)}
    if judge is not None:
        scores["chance"] = {"judge": {name: round(share, 4) for name, share in chance().items()}}
    return scores
