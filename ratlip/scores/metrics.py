"""The numbers made of features: torch-fidelity's formulas, on arrays that lie on disk.

Conventions, the field's: kernel distance with 100 subsets of min(1000, n) images, cubic kernel; precision
and recall with the third nearest neighbour; IS as the mean of 10 parts. No more than a block of rows is in
memory, but precision and recall compare a block with all others (1000 x n distances), and IS reads a tenth
of the rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ratlip.cache import blocks
from ratlip.errors import SettingsError

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE, NEIGHBOURHOOD, PARTS, SEED = 100, 1000, 3, 10, 2020


@dataclass
class Moments:
    """Mean (E,) and covariance (E,E), divided by n - 1, of rows that come in blocks; float64.

    Blocks are merged by the formula of Chan, Golub and LeVeque (1979), which does not subtract large sums.
    """

    count: int = 0
    mean: np.ndarray | float = 0.0
    scatter: np.ndarray | float = 0.0

    def add(self, rows: np.ndarray) -> Moments:
        """Count `rows` (B,E) in."""
        n, mean = len(rows), rows.mean(axis=0)
        centred, shift, total = rows - mean, mean - self.mean, self.count + len(rows)
        self.scatter = self.scatter + centred.T @ centred + np.outer(shift, shift) * (self.count * n / total)
        self.mean, self.count = self.mean + shift * (n / total), total
        return self

    @property
    def covariance(self) -> np.ndarray:
        return np.atleast_2d(self.scatter / (self.count - 1))


def moments(features: np.ndarray) -> Moments:
    """Moments of features (N,E), block by block. SettingsError for fewer than two rows."""
    if len(features) < 2:
        raise SettingsError(f"{len(features)} image has no covariance; set evaluation.images to 2 or more")
    found = Moments()
    for block in blocks(features):
        found.add(block)
    return found


def frechet(first: Moments, second: Moments) -> float:
    """Frechet distance of two Gaussians, by torch-fidelity's formula."""
    a, b = ({"mu": each.mean, "sigma": each.covariance} for each in (first, second))
    return float(fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"])


def frechet_distance(first, second) -> float:
    """Frechet distance of two sets of features (N,E) and (M,E), arrays or tensors."""
    return frechet(*(moments(np.asarray(features)) for features in (first, second)))


def kernel_distance(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Squared MMD with a cubic kernel, unbiased: mean and standard deviation over the subsets."""
    found = kid_features_to_metric(
        *map(torch.from_numpy, (first, second)),
        kid_subsets=KERNEL_SUBSETS,
        verbose=False,
        rng_seed=SEED,
        kid_subset_size=min(KERNEL_SUBSET_SIZE, len(first), len(second)),
    )
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean divergence of p(class | image) from p(class), mean over 10 parts in shuffled order."""
    order, parts = np.random.RandomState(SEED).permutation(len(logits)), min(PARTS, len(logits))
    found = [
        isc_features_to_metric(
            torch.from_numpy(
                np.asarray(logits[np.sort(order[part * len(logits) // parts : (part + 1) * len(logits) // parts])])
            ),
            splits=1,
            shuffle=False,
        )
        for part in range(parts)
    ]
    return float(np.mean([each["inception_score_mean"] for each in found]))


def precision_recall(generated: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Share of generated images within the manifold of real ones, and the reverse.

    Source: Kynkaanniemi et al. (2019), in the features of whatever extractor made them.
    """
    neighbourhood = min(NEIGHBOURHOOD, len(generated) - 1, len(real) - 1)
    found = prc_features_to_metric(
        *map(torch.from_numpy, (generated, real)),
        prc_neighborhood=neighbourhood,
        prc_batch_size=1000,
        save_cpu_ram=True,
        verbose=False,
    )
    return found["precision"], found["recall"]


def quality(
    features: np.ndarray, logits: np.ndarray, reference: np.ndarray, reference_moments: Moments | None = None
) -> dict[str, float]:
    """The scores that compare a set of images with a reference, rounded to 5 significant digits.

    features (N,E), logits (N,C), reference (M,E).
    """
    distance = frechet(moments(features), reference_moments or moments(reference))
    kernel, kernel_sd = kernel_distance(features, reference)
    precision, recall = precision_recall(features, reference)
    found = {
        "frechet_distance": distance,
        "kernel_distance": kernel,
        "kernel_distance_sd": kernel_sd,
        "inception_score": inception_score(logits),
        "precision": precision,
        "recall": recall,
    }
    return {name: float(f"{value:.5g}") for name, value in found.items()}
