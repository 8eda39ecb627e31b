"""The numbers made of features: torch-fidelity's formulas, on arrays that lie on disk.

Conventions, the field's: kernel distance with 100 subsets of min(1000, n) images, cubic kernel; precision and recall
with the third nearest neighbour; IS as the mean of 10 parts. No more than a block of rows is in memory, but precision
and recall compare a block with all others (1000 x n distances), and IS reads a tenth of the rows at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ratlip.data.store import blocks
from ratlip.errors import SettingsError

# torch-fidelity is imported where a score is computed: with torchvision 1.2 s, which reading scores need not wait for.
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE, NEIGHBOURHOOD, PARTS, SEED = 100, 1000, 3, 10, 2020


class Moments(NamedTuple):
    """Mean (E,) and covariance (E,E), divided by n - 1; float64."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Moments of features (N,E), block by block. SettingsError for fewer than two rows.

    Blocks are merged by the formula of Chan, Golub and LeVeque (1979), which does not subtract large sums.
    """
    if len(features) < 2:
        raise SettingsError(f"{len(features)} image has no covariance; set evaluation.images to 2 or more")
    count, mean, scatter = 0, np.zeros(features.shape[1]), 0.0
    for rows in blocks(features):
        n, total, own = len(rows), count + len(rows), rows.mean(axis=0)
        centred, shift = rows - own, own - mean
        scatter = scatter + centred.T @ centred + np.outer(shift, shift) * (count * n / total)
        mean, count = mean + shift * (n / total), total
    return Moments(mean, np.atleast_2d(scatter / (count - 1)))


def frechet_distance(first: np.ndarray | torch.Tensor, second: np.ndarray | torch.Tensor) -> float:
    """Frechet distance of two sets of features (N,E) and (M,E), each taken for a Gaussian."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    found = [moments(np.asarray(features)) for features in (first, second)]
    a, b = ({"mu": each.mean, "sigma": each.covariance} for each in found)
    return float(fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"])


def kernel_distance(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Squared MMD with a cubic kernel, unbiased: mean and standard deviation over the subsets."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KERNEL_SUBSET_SIZE, len(first), len(second))
    options = dict(kid_subsets=KERNEL_SUBSETS, kid_subset_size=size, rng_seed=SEED, verbose=False)
    found = kid_features_to_metric(torch.from_numpy(first), torch.from_numpy(second), **options)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean divergence of p(class | image) from p(class), mean over 10 parts in shuffled order."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    order, n, parts = np.random.RandomState(SEED).permutation(len(logits)), len(logits), min(PARTS, len(logits))
    found = []
    for part in range(parts):
        rows = np.asarray(logits[np.sort(order[part * n // parts : (part + 1) * n // parts])])
        found.append(isc_features_to_metric(torch.from_numpy(rows), splits=1, shuffle=False)["inception_score_mean"])
    return float(np.mean(found))


def precision_recall(generated: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Share of generated images within the manifold of real ones, and the reverse: Kynkaanniemi et al. (2019)."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    neighbours = min(NEIGHBOURHOOD, len(generated) - 1, len(real) - 1)
    options = dict(prc_neighborhood=neighbours, prc_batch_size=1000, save_cpu_ram=True, verbose=False)
    found = prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(real), **options)
    return found["precision"], found["recall"]


def distances_and_diversity(features: np.ndarray, logits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The scores of features (N,E) and logits (N,C) beside a reference (M,E), rounded to 5 significant digits."""
    found = {"frechet_distance": frechet_distance(features, reference)}
    found["kernel_distance"], found["kernel_distance_sd"] = kernel_distance(features, reference)
    found["inception_score"] = inception_score(logits)
    found["precision"], found["recall"] = precision_recall(features, reference)
    return {name: float(f"{value:.5g}") for name, value in found.items()}
