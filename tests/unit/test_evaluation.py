"""Scores: the distance against its closed form, every image counted, the same numbers twice."""

import copy
import shutil
import weakref

import numpy as np
import pytest
import torch

from ratlip.clip.frozen import FrozenClip
from ratlip.clip.loading import build_small_clip
from ratlip.errors import RunError, SettingsError
from ratlip.files import read_json
from ratlip.scores import evaluation, metrics
from ratlip.settings import load_settings
from ratlip.training import generation, session, step
from ratlip.workspace import Workspace

DISTANCES = ("frechet_distance", "kernel_distance", "kernel_distance_sd", "inception_score", "precision", "recall")


def score(smoke, home, overrides=(), judge=True, **options):
    """Scores of the smoke run by other settings of `evaluation`, with a home for features of its own."""
    options = {"independent": smoke.workspace.independent, **options}
    return evaluation.evaluate(
        smoke.run,
        load_settings("smoke", dict(overrides)),
        smoke.workspace.prepared,
        smoke.workspace.clip,
        smoke.workspace.judge if judge else None,
        root=home,
        progress=False,
        **options,
    )


def without_time(scores):
    return {key: value for key, value in scores.items() if key != "seconds_per_image"}


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
    assert metrics.frechet_distance(a, b) == pytest.approx((1 + 0 + 4) + (1 + 0 + 4), rel=1e-6)


def test_frechet_distance_of_correlated_gaussians_is_the_closed_form():
    one, two = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[3.0, -1.0], [-1.0, 1.0]])
    eigenvalues = np.linalg.eigvals(one @ two)
    expected = 4.0 + np.trace(one) + np.trace(two) - 2 * np.sqrt(eigenvalues).sum()
    distance = metrics.frechet_distance(gaussian([0.0, 0.0], one), gaussian([2.0, 0.0], two, seed=1))
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_equal_sets_is_nothing_and_it_is_symmetric():
    a, b = torch.randn(300, 16), 2 * torch.randn(200, 16) + 1
    assert metrics.frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a))


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
    published = copy.copy(smoke.workspace.clip)
    published.normalisation = "published"
    scores = [
        evaluation.evaluate(smoke.run, smoke.settings, smoke.workspace.prepared, clip, progress=False)
        for clip in (smoke.workspace.clip, published)
    ]
    for each in scores:
        del each["seconds_per_image"]
    assert scores[0] == scores[1] and published.normalisation == "published"


def test_scores_are_the_same_twice_and_only_the_time_may_differ(smoke):
    torch.manual_seed(99)
    again = smoke.workspace.evaluate()
    assert {**again, "seconds_per_image": 0} == {**smoke.scores, "seconds_per_image": 0}


def test_the_batch_size_of_the_scores_does_not_change_them(smoke):
    """48 images in batches of 7: the last partial batch is counted (difference 9)."""
    settings = load_settings("smoke", {"evaluation.batch_size": 7})
    other = evaluation.evaluate(
        smoke.run,
        settings,
        smoke.workspace.prepared,
        smoke.workspace.clip,
        smoke.workspace.judge,
        independent=smoke.workspace.independent,
        progress=False,
    )
    assert other["images"] == 48
    assert other["clip_similarity"] == pytest.approx(smoke.scores["clip_similarity"], abs=2e-4)
    assert other["frechet_distance"] == pytest.approx(smoke.scores["frechet_distance"], rel=1e-3)
    assert other["judge"] == pytest.approx(smoke.scores["judge"], abs=0.03)


def test_every_caption_of_a_partial_batch_becomes_an_image(smoke):
    generator = generation.load_generator(smoke.run, smoke.settings, smoke.workspace.clip)
    latent, sentence = step.sample_latents(0, 1, 11, 8), smoke.workspace.sentences("test")[:11]
    whole = generation.generate(generator, latent, sentence, batch_size=64)
    parts = generation.generate(generator, latent, sentence, batch_size=4)
    assert whole.shape == (11, 3, 16, 16) and whole.abs().max() <= 1
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert whole.flatten(1).std(dim=0).mean() > 1e-3  # they differ among one another
    embedded = evaluation.embed(smoke.workspace.clip, whole, batch_size=4)
    torch.testing.assert_close(embedded, evaluation.embed(smoke.workspace.clip, whole), rtol=1e-4, atol=1e-5)


def test_pairs_go_through_the_split_and_then_through_the_next_captions(smoke):
    test = smoke.workspace.prepared.test
    numbers, captions = evaluation.test_pairs(smoke.workspace.prepared, 2 * len(test) + 3)
    assert numbers.tolist() == [*range(len(test)), *range(len(test)), 0, 1, 2]
    assert captions[0] == test.captions[0][0]
    assert captions[1] == test.captions[1][1]  # all wordings occur
    assert captions[len(test)] == test.captions[0][1]
    assert captions[2 * len(test) + 2] == test.captions[2][4]


def test_the_averaged_generator_is_the_one_that_is_scored(smoke):
    saved = session.read_checkpoint(smoke.run / "checkpoint.pt", "cpu")["networks"]
    generator = generation.load_generator(smoke.run, smoke.settings, smoke.workspace.clip)
    assert not generator.training
    loaded = {key: value.cpu() for key, value in generator.state_dict().items()}
    for key, value in loaded.items():
        assert torch.equal(value, saved["average"][f"module.{key}"]), key
    assert any(not torch.equal(loaded[key], saved["generator"][key]) for key in loaded)


def test_loading_a_generator_leaves_the_callers_random_numbers_alone(smoke):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    generation.load_generator(smoke.run, smoke.settings, smoke.workspace.clip)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_of_another_clip_is_not_scored(smoke, tmp_path):
    folder = shutil.copytree(smoke.run, tmp_path / "run")
    text = (folder / "identity.json").read_text()
    (folder / "identity.json").write_text(text.replace(smoke.workspace.clip.fingerprint, "0123456789ab"))
    with pytest.raises(RunError, match="was trained with the CLIP 0123456789ab"):
        generation.load_generator(folder, smoke.settings, smoke.workspace.clip)


def test_a_run_that_is_not_complete_is_not_scored(smoke, tmp_path):
    from ratlip.workspace import Workspace

    with pytest.raises(RunError, match="not trained to its last step; run `ratlip train`"):
        Workspace.of(smoke.settings, tmp_path).evaluate()


def test_every_score_of_the_generated_images_has_its_fellow_and_its_name(smoke):
    scores, real = smoke.scores, smoke.scores["real"]
    for key in ("clip_similarity", "independent_similarity", *DISTANCES):
        assert np.isfinite([scores[key], real[key]]).all(), key
        name = {"clip_similarity": smoke.workspace.clip}.get(key, smoke.workspace.independent).name
        assert name in scores["labels"][key]
    assert scores["labels"]["frechet_distance"] == f"FD ({smoke.workspace.independent.name})"
    assert not any(word in label for label in scores["labels"].values() for word in ("FID", "KID"))
    assert scores["extractor"] == smoke.workspace.independent.name != smoke.workspace.clip.name
    assert set(real) <= set(scores) and real["images"] == 48 and scores["protocol"] == "standard"
    assert 0 <= scores["judge_all"] <= min(scores["judge"].values())
    assert without_time(read_json(smoke.run / "scores.json")) == without_time(scores)


def test_the_similarities_are_those_of_the_two_clips(smoke, tmp_path):
    """Computed here in one go, from the captions and images of the real test split; there in batches of 7."""
    real = score(smoke, tmp_path, {"evaluation.batch_size": 7})["real"]
    workspace, test = smoke.workspace, smoke.workspace.prepared.test
    numbers, captions = evaluation.test_pairs(workspace.prepared, 48)
    images = evaluation.real_images(test, numbers, 16, 16)
    for key, clip in (("clip_similarity", workspace.clip), ("independent_similarity", workspace.independent)):
        cosine = torch.cosine_similarity(clip.embed_images(images), clip.embed_text(captions)).mean()
        assert real[key] == pytest.approx(cosine.item(), abs=1e-4)
        assert smoke.scores["real"][key] == pytest.approx(cosine.item(), abs=1e-4)


def test_without_an_independent_clip_the_training_clip_is_the_extractor(smoke, tmp_path):
    scores = score(smoke, tmp_path, judge=False, independent=None)
    assert scores["independent_similarity"] is None and scores["real"]["independent_similarity"] is None
    assert scores["labels"]["frechet_distance"] == f"FD ({smoke.workspace.clip.name})"
    assert "judge" not in scores and "judge_all" not in scores and "chance" not in scores


def test_an_independent_clip_of_another_image_size_sees_the_images_resized(smoke, tmp_path):
    torch.manual_seed(0)
    vocabulary = smoke.workspace.clip.tokenizer
    large = FrozenClip(
        build_small_clip(40, 8, 16, 2, 1, 16, 1, 1, 16, vocabulary.context_length, len(vocabulary)),
        vocabulary,
        "another CLIP",
    )
    scores = score(smoke, tmp_path, independent=large)
    assert np.isfinite([scores["independent_similarity"], scores["frechet_distance"]]).all()
    assert scores["labels"]["frechet_distance"] == "FD (another CLIP)"


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_scores(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr("ratlip.data.store.RECORD_EVERY", 2)
    plain, drawn = generation.generate, []

    def stops(generator, latent, sentence, batch_size):
        drawn.append(len(latent))
        if len(drawn) == 6:
            raise KeyboardInterrupt
        return plain(generator, latent, sentence, batch_size)

    few = {"evaluation.batch_size": 5}
    whole = score(smoke, tmp_path / "whole", few)
    monkeypatch.setattr(evaluation, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        score(smoke, tmp_path / "parts", few)
    assert len(list(smoke.run.glob("evaluation-*/progress.json"))) == 1
    assert without_time(score(smoke, tmp_path / "parts", few)) == without_time(whole)
    assert sum(drawn) == 5 * 6 + 48 - 20  # 4 of the 6 batches were on record
    assert not list(smoke.run.glob("evaluation-*"))


def interrupt(*_):
    raise KeyboardInterrupt


def test_another_generator_does_not_take_what_was_left_behind(smoke, tmp_path, monkeypatch):
    """An interrupted evaluation of other weights must not lend its images to this one."""
    expected = score(smoke, tmp_path / "home")
    other = shutil.copytree(smoke.run, tmp_path / "home" / "runs" / "other")
    checkpoint = torch.load(other / "checkpoint.pt", weights_only=True)
    for _name, tensor in checkpoint["networks"]["average"].items():
        if tensor.is_floating_point():
            tensor.mul_(1.5)
    torch.save(checkpoint, other / "checkpoint.pt")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "_real_scores", interrupt)
        score(smoke, tmp_path / "home")
    (left,) = smoke.run.glob("evaluation-*")
    shutil.move(left, other / left.name)
    changed = evaluation.evaluate(
        other,
        smoke.settings,
        smoke.workspace.prepared,
        smoke.workspace.clip,
        smoke.workspace.judge,
        independent=smoke.workspace.independent,
        root=tmp_path / "home",
        progress=False,
    )
    assert changed["frechet_distance"] != expected["frechet_distance"]


@pytest.mark.parametrize("count", [48, 240])
def test_no_more_than_a_few_batches_of_images_live_at_once(smoke, tmp_path, monkeypatch, count):
    alive, most = [0], [0]

    def counted(make):
        def made(*arguments):
            images = make(*arguments)
            alive[0] += len(images)
            most[0] = max(most[0], alive[0])
            weakref.finalize(images, lambda n: alive.__setitem__(0, alive[0] - n), len(images))
            return images

        return made

    for name in ("generate", "real_images"):
        monkeypatch.setattr(evaluation, name, counted(getattr(evaluation, name)))
    scores = score(smoke, tmp_path, {"evaluation.batch_size": 6, "evaluation.images": count})
    assert scores["images"] == count and 6 <= most[0] <= 12


def test_real_images_are_read_once_for_all_runs(smoke, tmp_path, monkeypatch):
    first = score(smoke, tmp_path)
    monkeypatch.setattr(evaluation, "real_images", lambda *_: pytest.fail("they were there"))
    assert without_time(score(smoke, tmp_path)) == without_time(first)


def test_real_test_images_are_counted_once_each(smoke, tmp_path):
    """With an image in it three times, the set would have neighbours at no distance."""
    scores = score(smoke, tmp_path, {"evaluation.images": 150})
    assert scores["images"] == 150 and scores["real"]["images"] == 48
    assert scores["reference"] == "192 training images" and scores["real"] == smoke.scores["real"]


def test_the_published_protocol_by_its_name(smoke, tmp_path):
    test_images = len(smoke.workspace.prepared.test)
    published = evaluation.protocol_settings("published", test_images)
    assert published["evaluation.images"] == 12 * 48
    scores = score(smoke, tmp_path, {**published, "evaluation.batch_size": 50})
    assert scores["protocol"] == "published" and scores["images"] == 550  # 26 of 576 in the last batch
    assert scores["labels"]["frechet_distance"].endswith(", published range)")
    assert scores["labels"]["clip_similarity"].endswith(", published normalisation)")
    assert abs(scores["clip_similarity"] - smoke.scores["clip_similarity"]) > 1e-4
    assert scores["frechet_distance"] < smoke.scores["frechet_distance"]  # less contrast, smaller features


@pytest.mark.parametrize(
    "overrides, name",
    [
        ({}, "standard"),
        ({"evaluation.images": 7}, "standard"),
        ({"evaluation.last_batch": "drop"}, "mixed"),
        ({**evaluation.protocol_settings("published", 48), "evaluation.images": 48}, "mixed"),
        (evaluation.protocol_settings("published", 48), "published"),
    ],
)
def test_settings_of_either_protocol_have_its_name(overrides, name):
    assert evaluation.protocol_name(load_settings("smoke", overrides).evaluation, 48) == name


def test_a_protocol_that_counts_no_image_is_an_error_of_the_user(smoke, tmp_path):
    with pytest.raises(SettingsError, match="last_batch=drop leaves none of evaluation.images=48"):
        score(smoke, tmp_path, {"evaluation.last_batch": "drop", "evaluation.batch_size": 64})


def test_the_validation_split_is_scored_where_it_is_asked_for(tmp_path):
    given = {"data.named": "subset", "data.validation_images": 24, "evaluation.images": 24, "training.steps": 2}
    found = {}
    for split in ("test", "validation"):
        settings = load_settings("smoke", {**given, "evaluation.split": split})
        workspace = Workspace.of(settings, tmp_path, progress=False)
        workspace.train()
        scored = evaluation.asked_split(settings, workspace.prepared)
        assert scored.test is workspace.prepared[split]
        found[split] = workspace.evaluate()
    assert found["test"]["run"] == found["validation"]["run"]
    assert found["test"]["real"] != found["validation"]["real"]
    assert found["test"]["fresh"]["generated"] != found["validation"]["fresh"]["generated"]
    assert found["test"]["diversity"]["real"] != found["validation"]["diversity"]["real"]
    without = load_settings("smoke", {"evaluation.split": "validation"})
    with pytest.raises(SettingsError, match=r"evaluation.split=validation: .* has no such split; set data.validation"):
        evaluation.asked_split(without, Workspace.of(without, tmp_path, progress=False).prepared)
