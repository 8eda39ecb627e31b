"""Does the generator memorise? Distances from generated images to training images, beside those of real ones.

Real images, which no generator has seen, say how near an image of this kind comes to the training set by itself.
Captions of the training split are asked, for which a copy would be at hand, beside those of the test split.
Generated images of the same captions that come much nearer are copies (the idea of Meehan et al. 2020, "A
non-parametric test to detect data-copying"). Two spaces: embeddings of the independent CLIP, and small pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ratlip.clip.frozen import FrozenClip
from ratlip.data import facts
from ratlip.data.batches import real_images
from ratlip.data.generated import generated_set
from ratlip.data.prepared import Prepared, Split
from ratlip.scores.evaluation import TEST_LATENTS, embed, test_pairs
from ratlip.training.generation import generate
from ratlip.training.step import sample_latents

if TYPE_CHECKING:
    from ratlip.training.generation import Run

SPACES = ("independent CLIP", "pixels")
THUMB = 32  # side in pixels at which images are compared; larger ones are averaged down
NEAR = 0.01  # the share of real test images that are nearer to the training set than the bound of a near-copy
RESAMPLES, SEED = 2000, 31


@torch.no_grad()
def features(images: Tensor, clip: FrozenClip, batch_size: int = 128) -> dict[str, Tensor]:
    """Images (N,3,S,S) in [-1,1] -> for each space, rows (N,K) whose Euclidean distance is compared.

    CLIP embeddings have length 1; pixels are averaged down to 32 px at most and scaled, so that the distance is the
    root mean square difference of values in [-1,1].
    """
    embedded = F.normalize(embed(clip, images, batch_size), dim=1)
    small = (images if images.shape[-1] <= THUMB else F.adaptive_avg_pool2d(images, THUMB)).flatten(1)
    return dict(zip(SPACES, (embedded, small / small.shape[1] ** 0.5), strict=True))


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """For each of queries (N,K), distance (N,) to the nearest of references (M,K), and its number (N,)."""
    a, b = queries.double(), references.double()  # double: copies are at 1e-8, not 1e-3
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist").min(dim=1)


@dataclass(frozen=True)
class Neighbours:
    """Nearest training image of each generated and each real test image: distances (N,) and numbers (N,)."""

    generated: Tensor
    real: Tensor
    generated_number: Tensor
    real_number: Tensor

    def ratio(self) -> tuple[float, float, float]:
        """Median distance of generated images over that of real ones, with a 95 % bootstrap interval over images."""
        rng, pair = np.random.default_rng(SEED), (self.generated.numpy(), self.real.numpy())
        draws = [np.median(each[rng.integers(0, len(each), (RESAMPLES, len(each)))], axis=1) for each in pair]
        low, high = np.quantile(draws[0] / np.maximum(draws[1], 1e-12), (0.025, 0.975))
        return float(np.median(pair[0]) / max(np.median(pair[1]), 1e-12)), float(low), float(high)

    def near_copies(self) -> tuple[float, float]:
        """Share of generated images that are nearer than all but 1 % of real ones; its standard error."""
        share = float((self.generated < torch.quantile(self.real, NEAR)).double().mean())
        return share, float(np.sqrt(max(share * (1 - share), 1 / len(self.generated)) / len(self.generated)))

    def verdict(self) -> str:
        """ "copies", "nearer than real images" or "no sign of copying", by the bounds that notebook 8 explains."""
        share, error = self.near_copies()
        high = self.ratio()[2]
        if share - 2 * error > 10 * NEAR and high < 0.5:
            return "copies"
        return "nearer than real images" if high < 1 and share - 2 * error > NEAR else "no sign of copying"


def material(run: Run, prepared: Prepared, split: str, count: int) -> tuple[Tensor, Tensor]:
    """What `run` draws for `count` captions of a split, and real images that no training saw, both (N,3,S,S).

    The real ones are new renders of the same captions on a generated set, else test images.
    """
    s, part = run.settings, prepared[split]
    numbers, captions = test_pairs(replace(prepared, test=part), min(count, len(part)))
    latent = sample_latents(0, TEST_LATENTS, len(captions), s.model.latent_size)
    drawn = generate(run.generator, latent, run.clip.embed_text(captions).cpu())
    size: dict[str, Any] = dict(crop=s.data.crop, image_size=s.model.image_size)
    if part.attributes is None:
        shown = np.arange(len(captions)) % len(prepared.test)
        return drawn, real_images(prepared.test, shown, size["crop"], size["image_size"])
    made = generated_set(prepared)
    rows = [part.caption_offsets[i] + part.captions[i].index(text) for i, text in zip(numbers, captions, strict=True)]
    return drawn, made.fresh(facts.says(part, made.table)[rows], SEED, **size)[0]


def search(
    generated: Tensor, real: Tensor, split: Split, clip: FrozenClip, *, crop: int, image_size: int, flip: bool
) -> dict[str, Neighbours]:
    """The nearest images of `split` (training) to generated and to real test images, each (N,3,S,S) in [-1,1].

    All images of the split are searched, in batches: memory does not grow with them. Where training mirrors images
    (`flip`), a query and its mirror image are both looked for, and the nearer one counts.
    """
    ways = [torch.cat([generated, real])]
    queries = torch.cat([*ways, ways[0].flip(-1)] if flip else ways)
    wanted, found = features(queries, clip), {}
    for space in SPACES:
        found[space] = torch.full((len(queries),), torch.inf).double(), torch.zeros(len(queries)).long()
    for numbers in torch.arange(len(split)).split(256):
        references = features(real_images(split, numbers.numpy(), crop, image_size), clip)
        for space, (distance, number) in found.items():
            new, position = nearest(wanted[space], references[space])
            nearer = new < distance
            distance[nearer], number[nearer] = new[nearer], numbers[position[nearer]]
    spaces, sizes = {}, (len(generated), len(real))
    for space, (distance, number) in found.items():
        distance, which = distance.view(-1, sum(sizes)).min(dim=0)  # of the image and its mirror image
        number = number.view(-1, sum(sizes)).gather(0, which[None])[0]
        spaces[space] = Neighbours(*distance.split(sizes), *number.split(sizes))
    return spaces
