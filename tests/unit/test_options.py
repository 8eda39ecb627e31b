"""Options that trade time for memory change no number beyond rounding, and none is on by default."""

from dataclasses import fields

import pytest
import torch

from ratlip.errors import SettingsError
from ratlip.fast import options
from ratlip.settings import load_settings
from ratlip.studies import bench
from ratlip.training.step import training_step


def stepped(folder, overrides, steps=2):
    """A world after some steps, and the losses of the first one."""
    here = bench.world("smoke", 4, folder, overrides)
    here.memory()
    losses = [training_step(here.run, here.batches[i]) for i in range(steps)]
    return here, [getattr(loss, field.name).item() for loss in losses[0] for field in fields(loss)]


def assert_same(one, other):
    """Weights and batch norm's averages after the steps; Adam makes full steps of gradients of rounding errors."""
    for name, network in one.run.networks.items():
        theirs = other.run.networks[name].state_dict()
        for key, tensor in network.state_dict().items():
            torch.testing.assert_close(tensor.float(), theirs[key].float(), rtol=1e-3, atol=5e-4, msg=key)


def test_no_option_is_on_and_none_names_a_run_unless_it_is():
    settings = load_settings("demo")
    for name in ("checkpointing", "channels_last", "cached_features"):
        assert getattr(settings.training, name) is False
        assert load_settings("demo", {f"training.{name}": True}).run_hash != settings.run_hash
        assert load_settings("demo", {f"training.{name}": False}).run_hash == settings.run_hash


@pytest.mark.parametrize("option", ["checkpointing", "channels_last", "cached_features"])
def test_a_step_with_the_option_is_the_same_step(tmp_path, option):
    plain, expected = stepped(tmp_path, {})
    here, losses = stepped(tmp_path, {f"training.{option}": True})
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert_same(here, plain)


def test_checkpointing_makes_maps_again_and_batch_norm_moves_once(tmp_path):
    here = bench.world("smoke", 4, tmp_path, {"training.checkpointing": True})
    generator, calls = here.run.networks["generator"], []
    generator.synthesis_blocks[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    training_step(here.run, here.batches[0])
    assert len(calls) == 2
    assert generator.synthesis_blocks[0].conv1.norm.num_batches_tracked == 1
    with torch.no_grad():
        generator(*here.inputs(2))
    assert len(calls) == 3  # without gradients nothing is made again


def test_cached_features_are_made_once(tmp_path):
    here = bench.world("smoke", 4, tmp_path, {"training.cached_features": True})
    seen = []
    here.run.clip.features, real = (
        lambda images, *a, **k: (seen.append(len(images)), real(images, *a, **k))[1],
        here.run.clip.features,
    )
    store = here.run.real_features
    images = torch.rand(4, 3, 16, 16)
    first = store(images, torch.tensor([3, 1, 2, 0]))
    again = store(images.flip(0), torch.tensor([0, 2, 1, 5]))
    assert seen == [4, 1]
    torch.testing.assert_close(again[:3], first.flip(0)[:3])


def test_cached_features_refuse_what_is_cut_anew_at_each_visit(tmp_path):
    here = bench.world("smoke", 4, tmp_path)
    clip, split = here.run.clip, here.batches.split
    for data in (load_settings("birds-small").data, here.run.settings.data.model_copy(update={"flip": True})):
        with pytest.raises(SettingsError, match="one view of each image"):
            options.RealFeatures(clip, [0], split, data)
    smaller = here.run.settings.data.model_copy(update={"crop": 12, "resize": 12})  # images longer than they are wide
    store = options.RealFeatures(clip, [0], split, smaller)
    with pytest.raises(SettingsError, match="16 x 16 px.*12 px"):
        store(torch.rand(1, 3, 16, 16), torch.tensor([0]))


def test_runs_of_before_name_an_option_that_is_gone():
    settings = load_settings("demo")
    assert load_settings("demo", {"training.compile": False}) == settings
    with pytest.raises(SettingsError, match="training: compile is gone: G's gradient was wrong with it"):
        load_settings("demo", {"training.compile": True})
