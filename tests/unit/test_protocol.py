"""The protocol study: rows against scores made elsewhere, resumption, other views of the reference."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ratlip.data.batches import real_images
from ratlip.errors import RunError
from ratlip.scores import evaluation, extractors, metrics
from ratlip.settings import load_settings
from ratlip.studies import protocol
from ratlip.training import generation
from ratlip.workspace import Workspace

KEYS = {"aspect", "variant", "images", "value", "label", "real"}


@pytest.fixture(scope="module")
def rows(smoke):
    return protocol.study(smoke.workspace)


def of(rows, aspect):
    return [row for row in rows if row["aspect"] == aspect]


def test_every_aspect_begins_with_the_standard_protocol(smoke, rows):
    """The value of scores.json, which `evaluate` makes another way round."""
    aspects = list(dict.fromkeys(row["aspect"] for row in rows))
    assert aspects == [
        "images",
        "reference",
        "crops",
        "resizing",
        "extractor",
        "numeric range",
        "last batch",
        "protocol",
    ]
    for aspect in aspects[1:]:
        first = of(rows, aspect)[0]
        assert first["value"] == pytest.approx(smoke.scores["frechet_distance"], rel=1e-4), aspect
        assert first["label"] == smoke.scores["labels"]["frechet_distance"] and first["images"] == 48
        assert len(of(rows, aspect)) > 1
    assert all(set(row) >= KEYS and np.isfinite(row["value"]) for row in rows)


def test_images_are_nested_and_their_spread_is_over_disjoint_parts(smoke, rows):
    found = of(rows, "images")
    assert [(row["images"], row["parts"]) for row in found] == [(24, 4), (48, 2), (96, 1)]
    assert [row["spread"] is None for row in found] == [False, False, True]
    assert found[1]["value"] == pytest.approx(smoke.scores["frechet_distance"], rel=1e-4)
    assert found[1]["real"] == pytest.approx(smoke.scores["real"]["frechet_distance"], rel=1e-4)
    assert found[2]["value"] == found[2]["mean"] and found[2]["real"] is None  # 48 test images, not 96
    workspace, clip = smoke.workspace, smoke.workspace.clip
    generator = generation.load_generator(smoke.run, smoke.settings, clip)
    latent = evaluation.sample_latents(0, evaluation.TEST_LATENTS, 96, 8)
    sentence = clip.embed_text(evaluation.test_pairs(workspace.prepared, 96)[1]).cpu()
    extractor = extractors.clip_extractor(workspace.independent)
    features = extractor(generation.generate(generator, latent, sentence))["features"]
    reference = extractor(real_images(workspace.prepared.train, range(192), 16, 16))["features"]
    parts = [metrics.frechet_distance(part, reference) for part in features.split(24)]
    assert found[0]["value"] == pytest.approx(parts[0], rel=1e-3)
    assert found[0]["mean"] == pytest.approx(np.mean(parts), rel=1e-3)
    assert found[0]["spread"] == pytest.approx(np.std(parts, ddof=1), rel=2e-2)


def test_the_published_row_is_the_score_of_the_published_settings(smoke, rows, tmp_path):
    """As many images as there are: 96 of 12 x 48, the last partial batch dropped."""
    overrides = {**evaluation.protocol_settings("published", 48), "evaluation.images": 96}
    assert smoke.settings.evaluation.batch_size == 64
    scores = evaluation.evaluate(
        smoke.run,
        load_settings("smoke", overrides),
        smoke.workspace.prepared,
        smoke.workspace.clip,
        independent=smoke.workspace.independent,
        root=tmp_path,
        progress=False,
    )
    row = of(rows, "protocol")[1]
    assert row["images"] == scores["images"] == 64
    assert row["value"] == pytest.approx(scores["frechet_distance"], rel=1e-3)
    assert row["label"] == scores["labels"]["frechet_distance"]


def test_the_published_range_alone_is_the_score_of_that_setting(smoke, rows, tmp_path):
    settings = load_settings("smoke", {"evaluation.inception_range": "published"})
    scores = evaluation.evaluate(
        smoke.run,
        settings,
        smoke.workspace.prepared,
        smoke.workspace.clip,
        independent=smoke.workspace.independent,
        root=tmp_path,
        progress=False,
    )
    row = of(rows, "numeric range")[1]
    assert (row["value"], row["real"]) == pytest.approx(
        (scores["frechet_distance"], scores["real"]["frechet_distance"]), rel=1e-3
    )


def test_photographs_have_no_judge_and_a_study_all_the_same(smoke, rows, tmp_path):
    workspace = Workspace.of(smoke.settings, smoke.workspace.root, progress=False)
    workspace.__dict__["judge"] = None  # what the property gives for photographs
    folder = shutil.copytree(smoke.run, tmp_path / "run", ignore=shutil.ignore_patterns("protocol-*"))
    assert protocol.study(workspace, folder) == [row for row in rows if row["variant"] != "judge"]


def test_extractors_are_named_and_what_they_measure_has_its_own_real_value(smoke, rows):
    found = {row["variant"]: row for row in of(rows, "extractor")}
    assert set(found) == {smoke.workspace.independent.name, smoke.workspace.clip.name, "judge"}
    assert all(row["label"] == f"FD ({name})" for name, row in found.items())
    assert all(0 <= row["real"] < row["value"] for row in found.values())
    assert len({row["value"] for row in found.values()}) == 3


def test_a_second_study_reads_what_is_there_and_leaves_no_features_in_the_run(smoke, rows, monkeypatch):
    monkeypatch.setattr(protocol, "generate", lambda *_: pytest.fail("it was there"))
    assert protocol.study(smoke.workspace) == rows
    assert not list(smoke.run.glob("study-*"))
    json.dumps(rows)


def test_an_interrupted_study_goes_on_with_the_aspects_that_are_missing(smoke, rows, monkeypatch):
    path = smoke.run / "protocol-study.json"
    whole = path.read_text()
    kept = json.loads(whole)
    for aspect in ("resizing", "extractor", "protocol"):
        del kept["rows"][aspect]
    path.write_text(json.dumps(kept))
    measured = protocol._Study.rows

    def missing(its, aspect):
        return pytest.fail("it was there") if aspect == "crops" else measured(its, aspect)

    monkeypatch.setattr(protocol._Study, "rows", missing)
    assert protocol.study(smoke.workspace) == rows
    assert json.loads(path.read_text()) == json.loads(whole)


@pytest.mark.parametrize(
    "harm", [lambda text: text[:40], lambda text: text.replace('"seed": 0', '"seed": 1'), lambda _: "[]"]
)
def test_rows_of_another_study_or_a_torn_file_are_measured_again(smoke, rows, monkeypatch, harm):
    path = smoke.run / "protocol-study.json"
    whole, measured = path.read_text(), []
    path.write_text(harm(whole))
    monkeypatch.setattr(protocol._Study, "rows", lambda _, aspect: measured.append(aspect) or [])
    try:
        protocol.study(smoke.workspace)
        assert len(measured) == 8
    finally:
        path.write_text(whole)


def test_a_run_that_is_not_complete_is_not_studied(smoke, tmp_path):
    with pytest.raises(RunError, match="not trained to its last step"):
        protocol.study(Workspace.of(smoke.settings, tmp_path))


def picture(height=20, width=24):
    """One image whose red is its column, whose green is its row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return pixels


@pytest.fixture
def split():
    return SimpleNamespace(image=lambda number: picture())


def as_pixels(images):
    return ((images + 1) * 127.5).round().int()


def test_without_options_reference_images_are_those_of_the_scores(smoke, split):
    train = smoke.workspace.prepared.train
    assert torch.equal(protocol.reference_images(train, range(5), 16, 16), real_images(train, range(5), 16, 16))
    torch.testing.assert_close(protocol.reference_images(split, range(2), 16, 12), real_images(split, range(2), 16, 12))


def test_random_crops_are_squares_of_the_image_and_differ(split):
    found = as_pixels(protocol.reference_images(split, range(40), 16, 16, side=16))
    left, top = found[:, 0, 0, 0], found[:, 1, 0, 0]
    assert set(left.tolist()) <= set(range(9)) and set(top.tolist()) <= set(range(5))
    assert len(set(left.tolist())) > 5 and len(set(top.tolist())) == 5
    assert torch.equal(found[:, 0, 0] - left[:, None], torch.arange(16).int().expand(40, 16))
    again = protocol.reference_images(split, [7, 3], 16, 16, side=16)
    assert torch.equal(as_pixels(again), found[[7, 3]])  # a function of the image's number alone


def test_about_half_are_mirrored_and_nothing_else_happens_to_them(split):
    plain = protocol.reference_images(split, range(60), 16, 16)
    found = protocol.reference_images(split, range(60), 16, 16, flip=True)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(plain, found, strict=True)]
    assert 15 < sum(mirrored) < 45
    assert all(was or torch.equal(a, b) for a, b, was in zip(plain, found, mirrored, strict=True))


def test_resizing_by_nearest_keeps_stripes_that_a_low_pass_filter_removes():
    stripes = torch.zeros(1, 3, 32, 32)
    stripes[..., ::2] = 255
    kept, filtered = (protocol.resize(stripes, 20, how) for how in ("nearest", "antialias"))
    assert set(kept.unique().tolist()) == {0, 255}
    assert filtered.std() < kept.std() / 2
    assert not torch.equal(filtered, protocol.resize(stripes, 20, "bicubic"))
