"""Why RAT is slow, when it is: how far captions and latents move what each affine reads, fresh and trained.

Ours, not the paper's. An affine learns from what its condition does from image to image: where that hardly changes, the
same steps of the optimiser turn gamma and beta less. `networks.affine.spread` defines the measure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ratlip.clip.frozen import FrozenClip
from ratlip.fast import accelerate
from ratlip.networks import Generator, Recurrence
from ratlip.networks.affine import spread, spreads
from ratlip.networks.generator import AFFINES, synthesis_sizes
from ratlip.settings import Settings, load_settings, profile_names
from ratlip.training.generation import Run
from ratlip.training.session import build_networks
from ratlip.training.start import match_spread, weights_by_name
from ratlip.training.step import sample_latents

SENTENCES = (0.3, 0.45)  # spreads of a pretrained CLIP's sentences between captions that are simulated


@torch.no_grad()
def by_layer(generator: Generator, latents: Tensor, sentences: Tensor) -> pd.DataFrame:
    """What the affine of each layer reads, one row a layer. latents (L,Z) and sentences (N,E), every pair of them.

    "captions": the spread between the captions of one latent, mean over latents. "latents": between the latents of one
    caption, mean over captions. "moved": length of the change from the layer before, relative to the length (NaN at
    the first layer and where another kind of condition begins). RAT as published: what its LSTMs read.
    """
    device, shape = next(generator.parameters()).device, (len(latents), len(sentences))
    pairs = (latents.repeat_interleave(shape[1], dim=0).to(device), sentences.repeat(shape[0], 1).to(device))
    before, rows = None, []
    for layer, c in enumerate(generator.conditions(*pairs), start=1):
        each = c.unflatten(0, shape)
        row = {"captions": spread(each).mean(), "latents": spread(each.transpose(0, 1)).mean()}
        if before is not None and before.shape == c.shape:
            row["moved"] = ((c - before).norm(dim=1) / c.norm(dim=1)).mean()
        rows.append({"layer": layer, "moved": float("nan"), **{name: float(value) for name, value in row.items()}})
        before = c
    return pd.DataFrame(rows)[["layer", "captions", "latents", "moved"]]


def fresh_and_trained(run: Run, sentences: Tensor, captions: int = 256, latents: int = 8) -> pd.DataFrame:
    """`by_layer` of a run's first weights and of its last, in the column "weights" ("first", "trained").

    sentences (N,E): embeddings of all training captions; of these, `captions` evenly spaced ones.
    """
    rows = torch.linspace(0, len(sentences) - 1, min(captions, len(sentences))).long()
    sample = sample_latents(1, 0, latents, run.settings.model.latent_size), sentences[rows].cpu()
    first, _ = build_networks(run.settings, run.clip, sentences)
    kinds = {"first": first.eval(), "trained": run.generator}
    return pd.concat([by_layer(g, *sample).assign(weights=name) for name, g in kinds.items()], ignore_index=True)


def measured(settings: Settings, clip: FrozenClip, sentences: Tensor) -> dict[str, float]:
    """`affine.spreads` of the paper's RAT, fresh, with these sizes and embeddings (N,E) of all training captions."""
    rat = settings.model.model_copy(update={"conditioning": "rat", "rat_input": "state"})
    generator, _ = build_networks(settings.model_copy(update={"model": rat}), clip)
    return match_spread(generator, sentences, settings.seed) or {}


def simulated(settings: Settings, sentence_spread: float, captions: int = 512, latents: int = 8) -> dict[str, float]:
    """`affine.spreads` of a fresh LSTM of these sizes, sentences of independent normal numbers with mean 0.

    For profiles whose CLIP is not here. Real sentences also have a mean, and correlated numbers. Where the profile is
    not the paper's RAT, what RAT in its place (`rat_scope`) would have.
    """
    c, m = settings.clip, settings.model
    embed_dim, grid = c.embed_dim, m.image_size // c.patch_size
    if c.source != "train":
        import open_clip  # here: 2 s that a profile with a small CLIP does not need

        config = open_clip.get_model_config(c.model)
        vision = config["vision_cfg"]
        embed_dim, grid = config["embed_dim"], vision["image_size"] // vision["patch_size"]
    blocks = m.mapper_blocks + (len(synthesis_sizes(grid, m.image_size)) if m.rat_scope == "generator" else 0)
    sizes = dict(sentence_size=embed_dim, latent_size=m.latent_size, hidden_size=m.hidden_size, steps=AFFINES * blocks)
    recurrence = Recurrence(**sizes)
    weights_by_name(recurrence, settings.seed, "simulated")
    accelerate(recurrence)
    draw = torch.Generator().manual_seed(settings.seed)
    sentences = sentence_spread * torch.randn(captions, embed_dim, generator=draw)
    return sizes | spreads(recurrence, sample_latents(settings.seed, 0, latents, m.latent_size), sentences)


def factor_table(profiles: Iterable[str] = (), sentence_spreads: Iterable[float] = SENTENCES) -> pd.DataFrame:
    """By how much captions move CAT's condition more than RAT's state at the start, simulated, one row a profile.

    A column for each spread of the sentences; `profiles`: by default all.
    """
    rows = []
    for name in profiles or profile_names():
        s = load_settings(name)
        row: dict[str, Any] = {"profile": name}
        for size in sentence_spreads:
            found = simulated(s, size)
            row |= {"h": found["hidden_size"], "sentence": found["sentence_size"], "latent": found["latent_size"]}
            row |= {"layers": found["steps"], f"factor, sentences {size:g}": found["factor"]}
        rows.append(row)
    return pd.DataFrame(rows).set_index("profile")
