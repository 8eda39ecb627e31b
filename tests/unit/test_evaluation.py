"""Scores: the distance against its closed form, every image counted, the same numbers twice."""
import copy
import shutil

import numpy as np
import pytest
import torch

from ratlip import evaluation, training
from ratlip.config import load_settings
from ratlip.errors import RunError


def gaussian(mean, covariance, n=200_000, seed=0):
    """Features whose sample mean and covariance are exactly those given."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(dim=0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T + torch.tensor(mean)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """|m1 - m2|^2 + sum (s1 - s2)^2 where the covariances are diagonal."""
    a = gaussian([0.0, 1.0, 2.0], np.diag([1.0, 4.0, 9.0]))
    b = gaussian([1.0, 1.0, 0.0], np.diag([4.0, 4.0, 1.0]), seed=1)
    assert evaluation.frechet_distance(a, b) == pytest.approx((1 + 0 + 4) + (1 + 0 + 4), rel=1e-6)


def test_frechet_distance_of_correlated_gaussians_is_the_closed_form():
    one, two = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[3.0, -1.0], [-1.0, 1.0]])
    eigenvalues = np.linalg.eigvals(one @ two)
    expected = 4.0 + np.trace(one) + np.trace(two) - 2 * np.sqrt(eigenvalues).sum()
    distance = evaluation.frechet_distance(gaussian([0.0, 0.0], one), gaussian([2.0, 0.0], two, seed=1))
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_equal_sets_is_nothing_and_it_is_symmetric():
    a, b = torch.randn(300, 16), 2 * torch.randn(200, 16) + 1
    assert evaluation.frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-6)
    assert evaluation.frechet_distance(a, b) == pytest.approx(evaluation.frechet_distance(b, a))


def test_the_scores_of_a_run_stand_beside_those_of_real_images(smoke):
    scores = smoke.scores
    assert scores["images"] == 48 and scores["run"] == smoke.run.name
    for part in (scores, scores["real"]):
        assert -1 <= part["clip_similarity"] <= 1
        assert part["frechet_distance"] >= 0
        assert set(part["judge"]) == set(scores["chance"]["judge"])
        assert all(0 <= share <= 1 for share in part["judge"].values())
    # Eight steps make no picture: real images must look better in every respect.
    assert scores["real"]["frechet_distance"] < scores["frechet_distance"] / 2
    assert scores["real"]["clip_similarity"] > scores["clip_similarity"]
    assert (smoke.run / "scores.json").is_file()


def test_runs_of_either_normalisation_are_scored_alike(smoke):
    """CLIP scores as it was trained to see, so that what a run was fed does not move its score."""
    published = copy.copy(smoke.space.clip)
    published.normalisation = "published"
    scores = [evaluation.evaluate(smoke.run, smoke.settings, smoke.space.prepared, clip, progress=False)
              for clip in (smoke.space.clip, published)]
    for each in scores:
        del each["seconds_per_image"]
    assert scores[0] == scores[1] and published.normalisation == "published"


def test_scores_are_the_same_twice_and_only_the_time_may_differ(smoke):
    torch.manual_seed(99)
    again = smoke.space.evaluate()
    assert {**again, "seconds_per_image": 0} == {**smoke.scores, "seconds_per_image": 0}


def test_the_batch_size_of_the_scores_does_not_change_them(smoke):
    """48 images in batches of 7: the last partial batch is counted (official.md, row 9)."""
    settings = load_settings("smoke", {"evaluation.batch_size": 7})
    other = evaluation.evaluate(smoke.run, settings, smoke.space.prepared, smoke.space.clip,
                                smoke.space.judge,
                                progress=False)
    assert other["images"] == 48
    assert other["clip_similarity"] == pytest.approx(smoke.scores["clip_similarity"], abs=2e-4)
    assert other["frechet_distance"] == pytest.approx(smoke.scores["frechet_distance"], rel=1e-3)
    assert other["judge"] == pytest.approx(smoke.scores["judge"], abs=0.03)


def test_every_caption_of_a_partial_batch_becomes_an_image(smoke):
    generator = evaluation.load_generator(smoke.run, smoke.settings, smoke.space.clip)
    noise, sentence = training.noise_for(0, 1, 11, 8), smoke.space.sentences("test")[:11]
    whole = evaluation.generate(generator, noise, sentence, batch_size=64)
    parts = evaluation.generate(generator, noise, sentence, batch_size=4)
    assert whole.shape == (11, 3, 16, 16) and whole.abs().max() <= 1
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert whole.flatten(1).std(dim=0).mean() > 1e-3  # they differ among one another
    embedded = evaluation.embed(smoke.space.clip, whole, batch_size=4)
    torch.testing.assert_close(embedded, evaluation.embed(smoke.space.clip, whole), rtol=1e-4, atol=1e-5)


def test_pairs_go_through_the_split_and_then_through_the_next_captions(smoke):
    test = smoke.space.prepared.test
    numbers, captions = evaluation.test_pairs(smoke.space.prepared, 2 * len(test) + 3)
    assert numbers.tolist() == [*range(len(test)), *range(len(test)), 0, 1, 2]
    assert captions[0] == test.captions[0][0]
    assert captions[1] == test.captions[1][1]  # all wordings occur
    assert captions[len(test)] == test.captions[0][1]
    assert captions[2 * len(test) + 2] == test.captions[2][4]


def test_the_averaged_generator_is_the_one_that_is_scored(smoke):
    saved = training.read_checkpoint(smoke.run / "checkpoint.pt", "cpu")["networks"]
    generator = evaluation.load_generator(smoke.run, smoke.settings, smoke.space.clip)
    assert not generator.training
    loaded = {key: value.cpu() for key, value in generator.state_dict().items()}
    for key, value in loaded.items():
        assert torch.equal(value, saved["average"][f"module.{key}"]), key
    assert any(not torch.equal(loaded[key], saved["generator"][key]) for key in loaded)


def test_loading_a_generator_leaves_the_callers_random_numbers_alone(smoke):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    evaluation.load_generator(smoke.run, smoke.settings, smoke.space.clip)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_of_another_clip_is_not_scored(smoke, tmp_path):
    folder = shutil.copytree(smoke.run, tmp_path / "run")
    text = (folder / "identity.json").read_text()
    (folder / "identity.json").write_text(text.replace(smoke.space.clip.fingerprint, "0123456789ab"))
    with pytest.raises(RunError, match="was trained with the CLIP 0123456789ab"):
        evaluation.load_generator(folder, smoke.settings, smoke.space.clip)


def test_a_run_that_is_not_complete_is_not_scored(smoke, tmp_path):
    from ratlip.pipeline import Workspace

    with pytest.raises(RunError, match="not trained to its last step; run `ratlip train`"):
        Workspace.of(smoke.settings, tmp_path).evaluate()
