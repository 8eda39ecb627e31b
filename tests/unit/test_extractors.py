"""Extractors: registered with torch-fidelity and giving its numbers; ranges, sizes, missing weights."""

import copy
import urllib.error

import numpy as np
import pytest
import torch
import torch_fidelity
from torch.utils.data import Dataset
from torch_fidelity import feature_extractor_inceptionv3 as tf_inception

from ratlip.errors import WeightsError
from ratlip.scores import extractors, metrics
from ratlip.settings import load_settings


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(24, 3, 4, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(small, size=16, mode="nearest")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of the right names and shapes with random values, as nobody is given the real one."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tf_inception, "load_state_dict_from_url", lambda *_, **__: {})
    patch.setattr(tf_inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = tf_inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    patch.undo()
    path = tmp_path_factory.mktemp("inception") / "made-here.pth"
    torch.save(state, path)
    return path


class Pictures(Dataset):
    def __init__(self, images):
        self.pixels = extractors.to_bytes(images)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_torch_fidelity_finds_the_clip_by_its_key_and_gives_our_numbers(smoke, images):
    """Its own pipeline, from pictures to scores, against ours on the same two sets."""
    extractor = extractors.clip_extractor(
        smoke.workspace.independent, extractors.class_captions(smoke.workspace.prepared.test, 50)
    )
    first, second = images, images.flip(3) * 0.5
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(first),
        input2=Pictures(second),
        feature_extractor=extractor.key,
        cuda=False,
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=24,
        verbose=False,
        cache=False,
    )
    one, two = extractor(first), extractor(second)
    ours = metrics.distances_and_diversity(one["features"].numpy(), one["logits"].numpy(), two["features"].numpy())
    for mine, its in {
        "frechet_distance": "frechet_inception_distance",
        "kernel_distance": "kernel_inception_distance_mean",
        "kernel_distance_sd": "kernel_inception_distance_std",
        "inception_score": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }.items():
        assert ours[mine] == pytest.approx(theirs[its], rel=2e-3, abs=1e-6), mine
    assert ours["frechet_distance"] > 1e-3 and ours["inception_score"] > 1


def test_features_are_the_embeddings_of_the_saved_picture_and_logits_zero_shot(smoke, images):
    clip, captions = smoke.workspace.independent, ["a red ring", "a blue square", "a green cross"]
    found = extractors.clip_extractor(clip, captions)(images)
    saved = extractors.to_bytes(images).float() / 127.5 - 1
    torch.testing.assert_close(found["features"], clip.embed_images(saved))
    unit = torch.nn.functional.normalize
    expected = clip.model.logit_scale.exp() * unit(found["features"]) @ unit(clip.embed_text(captions)).T
    torch.testing.assert_close(found["logits"], expected)


def test_the_extractor_keeps_the_standard_normalisation(smoke, images):
    published = copy.copy(smoke.workspace.clip)
    published.normalisation = "published"
    torch.testing.assert_close(
        extractors.clip_extractor(published)(images)["features"],
        extractors.clip_extractor(smoke.workspace.clip)(images)["features"],
    )
    assert published.normalisation == "published"


def test_the_published_range_is_the_one_that_was_measured():
    """Difference 6: about [-0.2, 0.43] over the channels."""
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (extractors.IMAGENET_MEAN, extractors.IMAGENET_STD)
    )
    black_and_white = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    ends = extractors.published_range(black_and_white, mean, std)
    assert ends.min().item() == pytest.approx(-0.188, abs=1e-3)
    assert ends.max().item() == pytest.approx(0.428, abs=1e-3)


def test_in_the_published_range_a_clip_gets_pixels_of_0_to_1(smoke, images):
    clip, seen = smoke.workspace.clip, {}
    hook = clip.model.visual.conv1.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    try:
        found = extractors.clip_extractor(clip, value_range="published")
        found(images)
    finally:
        hook.remove()
    torch.testing.assert_close(seen["x"], extractors.to_bytes(images).float() / 255, atol=1e-5, rtol=0)
    assert found.label("frechet_distance") == f"FD ({clip.name}, published range)"


def test_images_of_another_size_are_resized_with_a_low_pass_filter(smoke):
    grain = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    small = extractors.fit(grain, 16)
    assert small.shape[-2:] == (16, 16) and small.std() < 0.4  # without the filter 0.64, four pixels' mean
    assert extractors.fit(torch.ones(1, 3, 8, 8), 16).min() > 0.99  # in the right range when enlarged, too
    same = torch.rand(1, 3, 16, 16)
    assert extractors.fit(same, 16) is same
    assert extractors.clip_extractor(smoke.workspace.clip)(grain)["features"].shape == (1, 32)


def test_classes_are_distinct_captions_and_not_too_many(smoke):
    test = smoke.workspace.prepared.test
    few = extractors.class_captions(test, 10)
    assert len(set(few)) == len(few) == 10 and set(few) <= set(test.all_captions)
    assert len(extractors.class_captions(test)) == min(1000, len(set(test.all_captions)))


def test_the_settings_choose_the_independent_clip_and_its_name_is_in_every_label(smoke):
    workspace = smoke.workspace
    chosen = extractors.choose_extractor(smoke.settings, workspace.prepared, workspace.clip, workspace.independent)
    assert chosen.name == workspace.independent.name != workspace.clip.name
    assert {name: chosen.label(name) for name in ("frechet_distance", "inception_score")} == {
        "frechet_distance": f"FD ({chosen.name})",
        "inception_score": f"IS ({chosen.name})",
    }
    alone = extractors.choose_extractor(smoke.settings, workspace.prepared, workspace.clip)
    assert alone.name == workspace.clip.name


def test_inception_from_a_local_file_gives_torch_fidelitys_features(weights, images, smoke):
    settings = load_settings(
        "smoke", {"evaluation.extractor": "inception", "evaluation.extractor_weights": str(weights)}
    )
    ours = extractors.choose_extractor(settings, smoke.workspace.prepared, smoke.workspace.clip)
    found = ours(images[:3])
    theirs = torch_fidelity.utils.create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(weights),
    )(extractors.to_bytes(images[:3]))
    for mine, its in zip(("features", "logits"), theirs, strict=True):
        np.testing.assert_array_equal(found[mine].numpy(), its.numpy())
    assert found["features"].shape == (3, 2048) and found["features"].std() > 0
    assert ours.label("frechet_distance").startswith("FD (Inception-v3, other weights ")  # it is not FID


def test_inception_in_the_published_range_sees_less_contrast(weights, images):
    seen = {}
    extractor = extractors.inception_extractor(weights, "published")
    extractor.module.Conv2d_1a_3x3.conv.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    ends = torch.cat([torch.full((1, 3, 16, 16), value) for value in (-1.0, 1.0)])
    extractor(ends)
    expected = [
        [2 * m - 1, 2 * (m + s) - 1] for m, s in zip(extractors.IMAGENET_MEAN, extractors.IMAGENET_STD, strict=True)
    ]
    torch.testing.assert_close(seen["x"].mean(dim=(2, 3)).T, torch.tensor(expected), atol=1e-5, rtol=0)


def test_without_network_one_sentence_says_what_to_fetch_and_where_to_put_it(monkeypatch, tmp_path, capfd):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route\nto the host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        extractors.inception_extractor()
    said = str(caught.value)
    for part in (tf_inception.URL_INCEPTION_V3, "evaluation.extractor_weights: FILE", "profile demo", "URLError"):
        assert part in said
    assert "\n" not in said and capfd.readouterr() == ("", "")
    assert not extractors.cached_inception().exists()


@pytest.mark.parametrize("content", [b"no weights", b""])
def test_a_damaged_file_of_inception_is_named(tmp_path, content):
    path = tmp_path / "inception.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="inception.pth: is no intact file of torch-fidelity's Inception"):
        extractors.inception_extractor(path)


def test_a_missing_file_of_inception_names_the_setting(tmp_path):
    with pytest.raises(WeightsError, match=r"evaluation.extractor_weights=.*gone.pth.*no such file.*demo"):
        extractors.inception_extractor(tmp_path / "gone.pth")


def test_no_pickled_code_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    torch.save({"fc.bias": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(WeightsError, match="trap.pth"):
        extractors.inception_extractor(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()
