"""The diffusion model's side of the benchmark: its arithmetic with a fake clock, its networks where diffusers is."""

import importlib.util

import pytest
import torch

from ratlip.errors import RunError
from ratlip.studies import alone, diffusion
from ratlip.studies.diffusion import Diffusion

HERE = all(importlib.util.find_spec(name) for name in ("diffusers", "transformers"))
needs_diffusers = pytest.mark.skipif(not HERE, reason="needs diffusers and transformers: pip install -e '.[diffusion]'")
TINY = {  # the same classes, small
    "text": {
        **{"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"max_position_embeddings": 77, "projection_dim": 32, "vocab_size": 100},
    },
    "unet": {
        **{"sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 4, "layers_per_block": 1},
        **{"block_out_channels": (16, 32), "norm_num_groups": 8},
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "autoencoder": {
        **{"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8},
        **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    },
    "schedule": diffusion.SD15["schedule"],
}


class Counted:
    """Stands where a `Diffusion` would; each call takes seconds on a clock that only it moves."""

    device = torch.device("cpu")

    def __init__(self):
        self.now, self.calls = 0.0, []
        self.schedule = self
        self.timesteps = torch.tensor([981, 961])

    def took(self, seconds, *call):
        self.now += seconds
        self.calls.append(call)

    def set_timesteps(self, count):
        pass

    def parameters(self):
        return {"U-Net": 5}

    def latents(self, count, side):
        return torch.zeros(count, 4, side // 8, side // 8)

    def words(self, count):
        self.took(0.1 * count, "text", count)
        return torch.zeros(count, 77, 32)

    def step(self, latents, words, time):
        self.took(2.0 * len(words), "step", len(latents), len(words))
        return latents

    def decode(self, latents):
        self.took(7.0 * len(latents), "decoder", len(latents))

    def draw(self, count, side, steps):
        self.took(1000.0, "draw", count, side, steps)


@pytest.fixture
def counted(monkeypatch):
    model = Counted()
    monkeypatch.setattr("ratlip.studies.bench.time.perf_counter", lambda: model.now)
    monkeypatch.setattr(diffusion, "libraries", lambda: {"diffusers": "0"})
    monkeypatch.setattr(diffusion, "energy", lambda device: 3 * model.now)  # three watts
    return model


def test_guidance_doubles_the_batch_and_steps_are_multiplied(counted):
    found = diffusion.measure(counted, 4, 256, rounds=2, whole=True)
    seconds = {name: part["seconds"]["median"] for name, part in found["parts"].items()}
    assert seconds == pytest.approx(
        {"decoder": 7, "text, guided": 0.8, "step, guided": 16, "text, plain": 0.4, "step, plain": 8}
    )
    assert ("step", 4, 8) in counted.calls and ("step", 4, 4) in counted.calls
    assert ("draw", 4, 256, diffusion.WHOLE) in counted.calls and found["whole"]["seconds"]["median"] == 1000
    assert diffusion.picture(found, 50, guided=True) == pytest.approx((0.8 + 50 * 16) / 4 + 7)
    assert diffusion.picture(found, 1, guided=False) == pytest.approx((0.4 + 8) / 4 + 7)
    assert diffusion.picture(found, 1, guided=False, unit="joules") == pytest.approx(3 * ((0.4 + 8) / 4 + 7))


def test_joules_that_cannot_be_read_are_none(counted, monkeypatch):
    monkeypatch.setattr(diffusion, "energy", lambda device: None)
    found = diffusion.measure(counted, 1, 256)
    assert diffusion.picture(found, 50, True, "joules") is None and diffusion.picture(found, 50, True) > 100


def test_joules_of_the_processors_packages_are_added_and_their_parts_are_not(tmp_path):
    cpu = torch.device("cpu")
    assert diffusion.energy(cpu, tmp_path) is None
    for name, microjoules in (("intel-rapl:0", 2_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 9_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{microjoules}\n")
    assert diffusion.energy(cpu, tmp_path) == 2.5


def test_a_counter_that_began_anew_tells_nothing(monkeypatch):
    readings = iter([10.0, 2.0])
    monkeypatch.setattr(diffusion, "energy", lambda device: next(readings))
    assert diffusion.timed(lambda: None, torch.device("cpu"), 1)["joules"] is None


def test_without_the_library_one_sentence_says_what_to_do(monkeypatch):
    def version(name):
        raise diffusion.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(diffusion.importlib.metadata, "version", version)
    with pytest.raises(RunError, match=r"needs diffusers, which is not installed: pip install -e '.\[diffusion\]'"):
        Diffusion.build()


@needs_diffusers
class TestNetworks:
    def test_the_configuration_is_stable_diffusions(self):
        """Parameters as published: U-Net 859.5 M, text encoder 123.1 M, autoencoder 83.7 M, of which decoder 49.5 M."""
        with torch.device("meta"):
            model = Diffusion.build("meta")
        assert model.parameters() == {"text encoder": 123_060_480, "U-Net": 859_520_964, "decoder": 49_490_199}

    @torch.no_grad()
    def test_a_walk_is_text_steps_and_decoder(self, monkeypatch):
        model = Diffusion.build(configuration=TINY)
        seen = []
        model.unet.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
        images = model.draw(3, 64, steps=4, guided=True)
        assert images.shape == (3, 3, 64, 64) and images.abs().max() <= 1 and seen == [6] * 4
        seen.clear()
        assert model.draw(2, 64, steps=1).shape == (2, 3, 64, 64) and seen == [2]
        assert torch.equal(model.draw(2, 64, 2), model.draw(2, 64, 2))

    @torch.no_grad()
    def test_guidance_goes_beyond_the_caption(self):
        model = Diffusion.build(configuration=TINY)
        model.schedule.set_timesteps(2)
        noise, (free, told) = model.latents(1, 64), torch.randn(2, 1, 77, 32)
        alone_, both = model.step(noise, told, 1), model.step(noise, torch.cat([free, told]), 1)
        apart = both - model.step(noise, free, 1)
        torch.testing.assert_close(
            apart, diffusion.GUIDANCE * (alone_ - model.step(noise, free, 1)), rtol=1e-3, atol=1e-5
        )

    def test_its_parts_are_measured(self, monkeypatch):
        build = Diffusion.build
        monkeypatch.setattr(diffusion.Diffusion, "build", lambda device: build(device, TINY))
        found = alone.measure(
            {
                "kind": "denoising",
                "batch": 2,
                "side": 64,
                "rounds": 1,
                "whole": True,
                "threads": 1,
                "accelerator": "cpu",
            }
        )
        assert found["images"] == 2 and found["whole"]["seconds"]["median"] > 0 and found["peak_mib"] > 0
        assert set(found["versions"]) == {"diffusers", "transformers"}
