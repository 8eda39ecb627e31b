"""The judge reads attributes off real images, from images alone, the same way each time."""

import json

import pytest
import torch

from ratlip.data.batches import real_images
from ratlip.data.synthetic import ATTRIBUTES
from ratlip.errors import DataError, WeightsError
from ratlip.scores.judge import Judge, attribute_targets, chance, judge_right, judge_shares, load_judge
from ratlip.settings import load_settings
from ratlip.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A small set at 16 px, enough for a judge that knows what it sees."""
    settings = load_settings(
        "smoke", {"data.train_images": 840, "data.test_images": 120, "evaluation.judge_steps": 150}
    )
    return Workspace.of(settings, tmp_path_factory.mktemp("judge"), progress=False)


def images_of(workspace, split="test"):
    part = workspace.prepared[split]
    return real_images(part, range(len(part)), 16, 16), part.attributes


def test_it_reads_real_images_of_unseen_combinations_far_above_chance(workspace):
    images, attributes = images_of(workspace)
    shares = judge_shares(workspace.judge, images, attributes)
    for name, level in chance().items():
        assert shares[name] > level + 0.6 * (1 - level), (name, shares)
    said = json.loads((workspace.judge_folder / "judge.json").read_text())["accuracy_on_real_test_images"]
    assert said == pytest.approx(shares)


def test_it_does_not_find_what_is_not_there(workspace):
    images, attributes = images_of(workspace)
    others = attributes[7:] + attributes[:7]
    wrong = judge_right(workspace.judge, images, others)
    for name, hits in wrong.items():
        same = torch.tensor([a[name] == b[name] for a, b in zip(attributes, others, strict=True)])
        assert hits[~same].float().mean() < 0.25, name


def test_it_is_trained_once_and_then_read(workspace, monkeypatch):
    first = workspace.judge
    monkeypatch.setattr("ratlip.scores.judge._fit", lambda *_, **__: pytest.fail("trained again"))
    again = load_judge(workspace.prepared, workspace.judge_folder, crop=16, image_size=16, steps=150, progress=False)
    assert not again.training
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_a_damaged_file_says_what_to_do(workspace, tmp_path):
    options = dict(crop=16, image_size=16, steps=2, progress=False)
    load_judge(workspace.prepared, tmp_path / "j", **options)
    (tmp_path / "j" / "judge.pt").write_bytes(b"torn")
    with pytest.raises(WeightsError, match="judge.pt.*delete the folder"):
        load_judge(workspace.prepared, tmp_path / "j", **options)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"identity": 3}', "\x00"])
def test_a_note_that_is_damaged_says_what_to_do(workspace, tmp_path, content):
    (tmp_path / "judge.json").write_text(content)
    with pytest.raises(WeightsError, match="judge.json: not readable .*; delete the folder"):
        load_judge(workspace.prepared, tmp_path, crop=16, image_size=16, steps=2, progress=False)


def test_one_changed_bit_of_the_weights_is_an_error(workspace, tmp_path):
    options = dict(crop=16, image_size=16, steps=2, progress=False)
    load_judge(workspace.prepared, tmp_path, **options)
    weight = next(iter(torch.load(tmp_path / "judge.pt", weights_only=True).values()))
    content = bytearray((tmp_path / "judge.pt").read_bytes())
    content[content.index(weight.contiguous().numpy().tobytes()) + 6] ^= 1
    (tmp_path / "judge.pt").write_bytes(content)
    with pytest.raises(WeightsError, match="judge.pt: not readable .*; delete the folder"):
        load_judge(workspace.prepared, tmp_path, **options)


def test_other_steps_train_another_judge(workspace, tmp_path):
    one = load_judge(workspace.prepared, tmp_path / "j", crop=16, image_size=16, steps=2, progress=False)
    again = load_judge(workspace.prepared, tmp_path / "k", crop=16, image_size=16, steps=2, progress=False)
    other = load_judge(workspace.prepared, tmp_path / "j", crop=16, image_size=16, steps=3, progress=False)
    weights = [judge.state_dict()["trunk.0.weight"] for judge in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_each_attribute_has_a_head_for_its_values():
    logits = Judge(33)(torch.zeros(2, 3, 33, 33))
    assert {name: part.shape for name, part in logits.items()} == {
        name: (2, len(values)) for name, values in ATTRIBUTES.items()
    }
    targets = attribute_targets([{name: values[-1] for name, values in ATTRIBUTES.items()}])
    assert {name: int(value) for name, value in targets.items()} == {n: len(v) - 1 for n, v in ATTRIBUTES.items()}
    assert chance()["colour"] == 1 / 8


def test_it_is_for_the_generated_set_only(smoke, tmp_path):
    from types import SimpleNamespace

    photographs = SimpleNamespace(train=SimpleNamespace(attributes=None), folder="photographs")
    with pytest.raises(DataError, match="photographs: the judge needs"):
        load_judge(photographs, tmp_path, crop=16, image_size=16)
    assert Workspace.of(load_settings("birds-small"), tmp_path).judge is None
