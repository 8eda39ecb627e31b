"""Scores of features: streamed statistics are torch-fidelity's own, and each score points the right way."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from ratlip.data.store import blocks
from ratlip.errors import SettingsError
from ratlip.scores import metrics


def drawn(n, width=16, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (n, width))


@pytest.mark.parametrize("size", [1, 7, 64, 5000])
def test_streamed_statistics_are_torch_fidelitys(monkeypatch, size):
    monkeypatch.setattr(metrics, "blocks", lambda array: blocks(array, size))
    mixed = drawn(301) @ drawn(16, seed=1) + 100  # correlated, and far from nothing
    found, theirs = metrics.moments(mixed), fid_features_to_statistics(torch.from_numpy(mixed))
    np.testing.assert_allclose(found.mean, theirs["mu"], rtol=1e-6)
    np.testing.assert_allclose(found.covariance, theirs["sigma"], rtol=1e-6, atol=1e-9)


def test_the_distance_is_torch_fidelitys():
    a, b = drawn(500), drawn(400, seed=1, shift=0.3)
    statistics = [fid_features_to_statistics(torch.from_numpy(each)) for each in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert metrics.frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    assert theirs > 1


def test_the_inception_score_in_tenths_is_that_of_all_at_once():
    logits = torch.from_numpy(3 * drawn(205, 12)).float()
    theirs = isc_features_to_metric(logits)["inception_score_mean"]
    assert metrics.inception_score(logits.numpy()) == pytest.approx(theirs, rel=1e-6)
    assert metrics.inception_score(np.zeros((40, 12), np.float32)) == pytest.approx(1)


def test_few_images_have_an_inception_score_too():
    assert np.isfinite(metrics.inception_score(drawn(4, 12).astype(np.float32)))


def test_precision_is_of_the_generated_and_recall_of_the_real():
    real = np.concatenate([drawn(60), drawn(60, seed=1, shift=30)]).astype(np.float32)
    generated = drawn(60, seed=2).astype(np.float32) * 0.5  # one of two modes, and nothing but good ones
    precision, recall = metrics.precision_recall(generated, real)
    assert precision > 0.9 and recall < 0.5
    assert metrics.precision_recall(real, generated) == pytest.approx((recall, precision))


def test_the_kernel_distance_of_one_distribution_is_nothing_within_its_spread():
    a, b, c = (
        drawn(n, seed=seed, shift=shift).astype(np.float32)
        for n, seed, shift in ((300, 0, 0), (200, 1, 0), (200, 2, 0.5))
    )
    same, spread = metrics.kernel_distance(a, b)
    assert abs(same) < 4 * spread and spread > 0
    assert metrics.kernel_distance(a, c)[0] > 0.5


def test_one_image_has_no_covariance():
    with pytest.raises(SettingsError, match="evaluation.images to 2 or more"):
        metrics.moments(drawn(1))
    assert all(
        np.isfinite(value)
        for value in metrics.distances_and_diversity(*(drawn(n, seed=n).astype(np.float32) for n in (2, 2, 3))).values()
    )
