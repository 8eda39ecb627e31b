"""What a picture costs with diffusion: Stable Diffusion 1.5's own networks, timed in parts beside the generator.

The networks are those of diffusers and transformers in that model's configuration, with random weights: no time depends
on them, and nothing is downloaded. A picture is: the text encoder once, a number of denoising steps, the decoder once.
With classifier-free guidance every step (and the text encoder) works on a doubled batch. Distilled models walk the same
U-Net in 1 to 4 steps without guidance. Parts are timed, and a picture's time is put together from them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ratlip.errors import RunError
from ratlip.studies.bench import clock, spread
from ratlip.training.loop import peak_memory_mib

# Stable Diffusion 1.5: text encoder, U-Net, decoder and noise schedule; the rest are the libraries' defaults.
SD15: dict[str, dict[str, Any]] = {
    "text": {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        **{"max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu", "vocab_size": 49408},
    },
    "unet": {
        **{"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2},
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "autoencoder": {
        **{"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4},
        **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    },
    "schedule": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}
GUIDANCE, PIXELS_A_LATENT = 7.5, 8
WALKS = (  # steps, with guidance?, what it is
    (50, True, "50 steps, guidance"),
    (20, True, "20 steps, guidance"),
    (4, False, "distilled, 4 steps"),
    (1, False, "distilled, 1 step"),
)
SIDES = (256, 512)  # near our 224 (its U-Net halves a picture's side six times), and its own
WHOLE = 4  # steps without guidance that are also walked whole, against the sum of their parts
MEND = "pip install -e '.[diffusion]', or leave the section diffusion out"


def libraries() -> dict[str, str]:
    """Versions of the two libraries. RunError where one is not here."""
    try:
        return {name: importlib.metadata.version(name) for name in ("diffusers", "transformers")}
    except importlib.metadata.PackageNotFoundError as error:
        raise RunError(f"a diffusion model needs {error.name}, which is not installed: {MEND}") from error


@dataclass
class Diffusion:
    """Text encoder, U-Net, decoder and schedule on a device, in eval mode."""

    text: nn.Module
    unet: nn.Module
    autoencoder: Any
    schedule: Any
    device: torch.device

    @classmethod
    def build(cls, device: str | torch.device = "cpu", configuration: dict[str, dict] = SD15) -> Diffusion:
        """Random weights of a seed. RunError where the two libraries are not here."""
        libraries()
        importlib.import_module("torchvision")  # before transformers does: see `ratlip.compat`
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            text = CLIPTextModel(CLIPTextConfig(**configuration["text"]))
            unet = UNet2DConditionModel(**configuration["unet"])
            autoencoder = AutoencoderKL(**configuration["autoencoder"])
        autoencoder.encoder, autoencoder.quant_conv = nn.Identity(), nn.Identity()  # pictures go out, none comes in
        for network in (text, unet, autoencoder):
            network.eval().requires_grad_(False).to(device)
        return cls(text, unet, autoencoder, DDIMScheduler(**configuration["schedule"]), torch.device(device))

    def parameters(self) -> dict[str, int]:
        """Numbers of weights of the three networks."""
        networks = {"text encoder": self.text, "U-Net": self.unet, "decoder": self.autoencoder}
        return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}

    def words(self, count: int) -> Tensor:
        """`count` captions of full length (token numbers do not matter) -> their states (count,L,E)."""
        config: Any = self.text.config
        tokens = torch.arange(config.max_position_embeddings, device=self.device) % config.vocab_size
        return self.text(tokens.expand(count, -1))[0]

    def latents(self, count: int, side: int) -> Tensor:
        """Noise for `count` pictures of `side` pixels: (count,4,side/8,side/8)."""
        channels, small = self.autoencoder.config.latent_channels, side // PIXELS_A_LATENT
        noise = torch.Generator().manual_seed(0)
        return torch.randn(count, channels, small, small, generator=noise).to(self.device)

    def step(self, latents: Tensor, words: Tensor, time: int) -> Tensor:
        """One denoising step; guided where there are twice as many captions (none, then the own) as latents."""
        guided = len(words) == 2 * len(latents)
        noise = self.unet(torch.cat([latents, latents]) if guided else latents, time, words).sample
        if guided:
            free, told = noise.chunk(2)
            noise = free + GUIDANCE * (told - free)
        return self.schedule.step(noise, time, latents).prev_sample

    def decode(self, latents: Tensor) -> Tensor:
        """(B,4,s,s) -> images (B,3,8s,8s) in [-1,1]."""
        return self.autoencoder.decode(latents / self.autoencoder.config.scaling_factor).sample.clamp(-1, 1)

    def draw(self, count: int, side: int, steps: int, guided: bool = False) -> Tensor:
        """`count` images (count,3,side,side) of a whole walk."""
        self.schedule.set_timesteps(steps)
        words, latents = self.words(count * (1 + guided)), self.latents(count, side)
        for time in self.schedule.timesteps.tolist():
            latents = self.step(latents, words, time)
        return self.decode(latents)


@torch.no_grad()
def measure(model: Diffusion, count: int, side: int, rounds: int = 1, whole: bool = False) -> dict[str, Any]:
    """Seconds (and joules, where they can be read) of each part of drawing `count` images of `side` pixels.

    A step of each kind is timed `rounds` times after one unmeasured step of one image. The decoder works image by
    image, as pipelines do where memory is short; the time is that of one. `whole`: also a walk of `WHOLE` steps.
    """
    model.schedule.set_timesteps(50)
    time, one, noise = int(model.schedule.timesteps[0]), model.latents(1, side), model.latents(count, side)
    model.step(one, model.words(1), time)
    parts: dict[str, Callable[[], object]] = {"decoder": partial(model.decode, one)}
    for name, copies in (("guided", 2), ("plain", 1)):
        words = model.words(copies * count)
        parts |= {f"text, {name}": partial(model.words, copies * count)}
        parts |= {f"step, {name}": partial(model.step, noise, words, time)}
    found: dict[str, Any] = {"parts": {name: timed(work, model.device, rounds) for name, work in parts.items()}}
    if whole:
        found["whole"] = timed(partial(model.draw, count, side, WHOLE), model.device, 1)
    shape = {"images": count, "side": side, "parameters": model.parameters(), "versions": libraries()}
    return shape | found | {"peak_mib": peak_memory_mib(model.device)}


def picture(found: dict[str, Any], steps: int, guided: bool, unit: str = "seconds") -> float | None:
    """Seconds or joules an image of a walk, from `measure`: text + steps x step, shared by the batch, and a decoder.

    None where joules could not be read.
    """
    kind = "guided" if guided else "plain"
    text, step, decoder = (found["parts"][name].get(unit) for name in (f"text, {kind}", f"step, {kind}", "decoder"))
    if text is None or step is None or decoder is None:
        return None
    if unit == "seconds":
        text, step, decoder = (each["median"] for each in (text, step, decoder))
    return (text + steps * step) / found["images"] + decoder


def timed(work: Callable[[], object], device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of `work()` (median and range), and the joules of one where they can be read, else None."""
    before = energy(device)
    seconds = [clock(work, device) for _ in range(rounds)]
    after = energy(device)
    joules = None if before is None or after is None or after < before else (after - before) / rounds
    return {"seconds": spread(seconds), "joules": joules}


def energy(device: torch.device, powercap: Path = Path("/sys/class/powercap")) -> float | None:
    """Joules used so far by the processor's packages (RAPL) or the GPU (NVML); None where nothing tells.

    A counter begins anew after some hours, and what lies between two readings is then not known.
    """
    if device.type == "cuda":
        with suppress(Exception):  # no nvidia-ml-py, or a driver that does not tell
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        return None
    counters = [p / "energy_uj" for p in sorted(powercap.glob("*-rapl:*")) if p.name.count(":") == 1]
    with suppress(OSError, ValueError):  # readable by root alone on most systems
        return sum(int(counter.read_text()) for counter in counters) / 1e6 if counters else None
    return None
