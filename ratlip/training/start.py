"""How a run starts: every weight by its name, and the scale of RAT's states where the settings ask for one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratlip.cache import digest
from ratlip.networks import Generator
from ratlip.networks.affine import spreads
from ratlip.training.step import sample_latents

START = 23  # stream of random numbers (see training/step.py and data/batches.py for the others)
CAPTIONS, LATENTS = 1024, 8  # that spreads are taken of; all 163,840 of the demo change the factor by 0.2 %


def weights_by_name(network: nn.Module, seed: int, name: str) -> None:
    """Draw the fresh weights of `network`, called `name`, anew: each layer as a function of `seed` and its own name.

    So layers that two variants have in common (same name, same shapes) start equal, and other layers take nothing
    from each other's random numbers. Distributions are those of each layer's own `reset_parameters`; constants outside
    of layers (gates) stay. The convolution in a conv-shuffle goes by the name of the plain one in its place.
    """
    with torch.random.fork_rng(devices=[]):  # not the caller's
        for layer, module in network.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                key = [seed, name, layer.removesuffix(".conv")]
                torch.default_generator.manual_seed(int(digest(key, 15), 16))  # 60 bits
                reset()


def match_spread(generator: Generator, sentences: Tensor, seed: int) -> dict[str, float] | None:
    """Set the scale of RAT's states (`model.rat_input: scaled`) to the factor of `affine.spreads`, and return those.

    generator: fresh, on the CPU; sentences (N,E): embeddings of all training captions, of which up to 1,024 are taken,
    evenly spaced, with 8 latents of `seed`. Other generators are left as they are; None where there is no LSTM.
    """
    if generator.recurrence is None:
        return None
    rows = torch.linspace(0, len(sentences) - 1, min(CAPTIONS, len(sentences)), device=sentences.device).long()
    latents = sample_latents(seed, START, LATENTS, generator.latent_size)
    found = spreads(generator.recurrence, latents, sentences[rows].cpu().float())
    if generator.state_scale is not None:
        generator.state_scale.fill_(found["factor"])
    return found
