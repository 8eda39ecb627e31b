"""Notebook 07: the table of differences between paper and published code, and those in the generator.

Difference 1, the batch as the LSTM's time axis: `BatchEffect` to `composition_scores`; 2 and 3, recurrence over the
layers: `states` to `full_size`; 4, pixels normalised twice: `real_similarity`, `as_clip_sees`. The differences in
images, scores, training and files (5 to 12) are in `paper_versus_code_protocol`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from ratlip.clip.frozen import FrozenClip, with_normalisation
from ratlip.data.batches import real_images
from ratlip.data.prepared import Prepared
from ratlip.errors import RunError
from ratlip.networks import ConditionalAffine, Discriminator, Generator
from ratlip.networks.affine import OfficialRecurrentAffine, Recurrence
from ratlip.networks.losses import clip_similarity
from ratlip.published import rows as published_rows
from ratlip.scores.evaluation import TEST_LATENTS, embed, test_pairs
from ratlip.scores.judge import judge_right
from ratlip.settings import Settings, load_settings
from ratlip.studies.inspection import outputs
from ratlip.training.generation import Run, generate
from ratlip.training.session import build_networks
from ratlip.training.step import sample_latents
from ratlip.workspace import Workspace


def differences_table(measured: dict[int, str]) -> pd.DataFrame:
    """The twelve differences with what was measured of each. RunError where one has no measurement."""
    rows = published_rows()
    frame = pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="row"))
    missing = [str(row) for row in frame.index if not measured.get(row)]
    if missing:
        raise RunError(f"rows {', '.join(missing)} of the table were not measured: run the cells above")
    frame.insert(2, "measured effect", [measured[row] for row in frame.index])
    return frame


@dataclass(frozen=True)
class BatchEffect:
    """Image 0 of a batch among different mates. Lengths in standard deviations of all pixels shown.

    `images` (N,D,3,S,S): N captions, D draws of mates; `change` (N,): root mean square difference between two draws;
    `other_caption`: the same between images of two captions, for comparison.
    """

    images: Tensor
    change: Tensor
    other_caption: float

    def __str__(self) -> str:
        low, high = self.change.quantile(torch.tensor([0.05, 0.95])).tolist()
        return f"{self.change.mean():.2f} (90 % of captions: {low:.2f} to {high:.2f})"


def batch_effect(
    generator: Generator, latent: Tensor, sentence: Tensor, *, batch_size: int, draws: int = 4, seed: int = 0
) -> BatchEffect:
    """Draw each latent (N,Z) and sentence (N,E) as the first of a batch, `draws` times among other mates.

    Mates are others of the N sentences, each with a latent of its own, drawn by `seed`.
    """
    rng, images = np.random.default_rng([seed, 71]), []
    for i in range(len(sentence)):
        others = np.delete(np.arange(len(sentence)), i)
        for draw in range(draws):
            z = sample_latents(seed, 1 + i * draws + draw, batch_size, latent.shape[1])
            z[0] = latent[i]
            s = sentence[[i, *rng.choice(others, batch_size - 1)]]
            images.append(generate(generator, z, s, batch_size)[0])
    images = torch.stack(images).unflatten(0, (-1, draws))
    sd, flat = images.std(), images.flatten(2)
    pairs = torch.combinations(torch.arange(draws))
    change = (flat[:, pairs[:, 0]] - flat[:, pairs[:, 1]]).square().mean(2).sqrt().mean(1) / sd
    other = (flat - flat.roll(1, 0)).square().mean(2).sqrt().mean() / sd
    return BatchEffect(images, change, float(other))


def with_random_affines(generator: Generator, seed: int = 0) -> Generator:
    """A copy whose affines' last layers have random weights (normal, 1/sqrt of their inputs) of `seed`.

    A fresh affine is the identity, so that no condition has an effect before training; this shows how large the
    effect of an arbitrary one is.
    """
    other, draw = copy.deepcopy(generator), torch.Generator().manual_seed(seed)
    layers = [module for module in other.modules() if isinstance(module, ConditionalAffine)]
    for mlp in [part for layer in layers for part in (layer.gamma, layer.beta)]:
        weight = mlp[-1].get_parameter("weight")
        weight.data.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[1] ** 0.5)
    return other


def position_effect(
    generator: Generator, latent: Tensor, sentence: Tensor, *, batch_size: int, seed: int = 0
) -> list[dict[str, float]]:
    """How far image 0 moves (standard deviations, mean over N batches) when the mate at one position is another.

    latent (N,Z), sentence (N,E) of the images 0. One row a position: "position" 2 .. batch_size and "change".
    """
    rng, moved, shown = np.random.default_rng([seed, 72]), [], []
    rows = torch.arange(batch_size)
    exchanged = [rows, *(torch.where(rows == k, rows + batch_size, rows) for k in range(1, batch_size))]
    for i in range(len(sentence)):
        z = sample_latents(seed, 10_000 + i, 2 * batch_size, latent.shape[1])
        s = sentence[rng.integers(0, len(sentence), 2 * batch_size)]
        z[0], s[0] = latent[i], sentence[i]
        first = torch.stack([generate(generator, z[row], s[row], batch_size)[0] for row in exchanged]).flatten(1)
        moved.append((first[1:] - first[0]).square().mean(1).sqrt())
        shown.append(first[0])
    changes = torch.stack(moved).mean(0) / torch.stack(shown).std()
    return [{"position": k, "change": float(change)} for k, change in enumerate(changes, start=2)]


def test_images(run: Run, prepared: Prepared, count: int, batch_size: int = 64, order: Tensor | None = None) -> Tensor:
    """Images (count,3,S,S) of a run for the test captions that the scores use, in their order.

    `order` (count,): in which order they are drawn, that is, who is in whose batch; latent and caption of an image
    stay the same.
    """
    sentence = run.clip.embed_text(test_pairs(prepared, count)[1]).cpu()
    latent = sample_latents(run.settings.seed, TEST_LATENTS, count, run.settings.model.latent_size)
    order = torch.arange(count) if order is None else order
    return generate(run.generator, latent[order], sentence[order], batch_size)[order.argsort()]


def composition_scores(
    workspace: Workspace, run: Run, count: int = 240, sizes: Sequence[int] = (1, 16, 64)
) -> pd.DataFrame:
    """Scores of the same images drawn in batches of several sizes and in another order: one row each.

    Columns: "CLIP similarity" (standard normalisation) and, with a judge, "all right": the share of images of which
    it finds all that the caption says.
    """
    prepared, clip, rows = workspace.prepared, workspace.clip, {}
    judge, attributes = workspace.judge, prepared.test.attributes
    numbers, captions = test_pairs(prepared, count)
    sentence, standard = clip.embed_text(captions).cpu(), with_normalisation(clip, "standard")
    order = torch.from_numpy(np.random.default_rng(73).permutation(count))
    ways: dict[str, tuple] = {f"batches of {size}": (size,) for size in sizes}
    ways[f"batches of {sizes[-1]}, shuffled"] = (sizes[-1], order)
    for name, way in ways.items():
        images = test_images(run, prepared, count, *way)
        rows[name] = {"CLIP similarity": float(clip_similarity(embed(standard, images), sentence).mean())}
        if judge is not None and attributes is not None:
            right = judge_right(judge, images, [attributes[i] for i in numbers])
            rows[name]["all right"] = float(torch.stack(list(right.values())).all(0).float().mean())
    return pd.DataFrame(rows).T


def states(generator: Generator, latent: Tensor, sentence: Tensor) -> list[Tensor]:
    """The LSTM state that each recurrent affine is made from, in the order of use, with their graph.

    RAT: (B,H), one for each image. RAT as published: (1,H), one for the batch. CAT: none.
    """
    device = next(generator.parameters()).device
    latent, sentence = latent.to(device), sentence.to(device)
    if generator.recurrence is not None:
        return Recurrence.forward(generator.recurrence, latent, sentence)  # its fast form shows no state between steps
    cells = [layer.lstm for layer in generator.modules() if isinstance(layer, OfficialRecurrentAffine)]
    return [hidden[0] for _, (hidden, _) in outputs(generator, cells, latent, sentence).values()]


def reach(generator: Generator, latent: Tensor, sentence: Tensor) -> Tensor:
    """(T,T): how much the state of layer u (column) moves when that of layer t (row) is moved, t < u.

    Mean over images of the norm of d(r . h_u)/d h_t, r a random direction of length 1; exactly 0 where nothing is
    handed on.
    """
    h = states(generator, latent, sentence)
    moved, draw = torch.zeros(len(h), len(h)), torch.Generator().manual_seed(0)
    for u in range(1, len(h)):
        direction = F.normalize(torch.randn(h[u].shape, generator=draw), dim=1).to(h[u].device)
        gradients = torch.autograd.grad((h[u] * direction).sum(), h[:u], retain_graph=True, allow_unused=True)
        for t, gradient in enumerate(gradients):
            moved[t, u] = 0 if gradient is None else gradient.norm(dim=1).mean().cpu()
    return moved


@torch.no_grad()
def settling(generator: Generator, latent: Tensor, sentence: Tensor) -> Tensor:
    """(T-1,N): how far each image's state moves at layer t = 2 .. T, relative to its length."""
    h = torch.stack(states(generator, latent, sentence))
    return ((h[1:] - h[:-1]).norm(dim=2) / h[1:].norm(dim=2)).cpu()


def settled_layer(moves: Tensor, below: float = 0.05) -> int | None:
    """The first layer (from 1) from which on all mean moves of `settling` are under `below`, or None."""
    large = (moves.mean(1) >= below).nonzero().flatten()
    last = int(large[-1]) + 2 if len(large) else 1  # moves[i] leads to layer i + 2
    return last + 1 if last < len(moves) + 1 else None


def affine_kinds(generator: Generator) -> dict[str, int]:
    """How many affines are fed by an LSTM that runs over the layers, by an LSTM of their own, and by none."""
    layers = [module for module in generator.modules() if isinstance(module, ConditionalAffine)]
    own = sum(isinstance(layer, OfficialRecurrentAffine) for layer in layers)
    shared = generator.recurrence.steps if generator.recurrence is not None else 0
    return {"one LSTM over the layers": shared, "an LSTM of its own": own, "CAT": len(layers) - own - shared}


def full_size(profile: str = "cub-published", **model) -> tuple[Generator, Discriminator]:
    """Both networks of a ViT-B/32 profile without any memory for weights (device "meta"), to be counted.

    `model`: settings of the section model laid over the profile's.
    """
    settings = load_settings(profile, {f"model.{name}": value for name, value in model.items()})
    clip: Any = SimpleNamespace(name="ViT-B/32", image_size=224, grid=7, width=768, embed_dim=512, layers=12)
    with torch.device("meta"):
        return build_networks(settings, clip)


def real_similarity(clip: FrozenClip, prepared: Prepared, settings: Settings, count: int) -> float:
    """Mean CLIP similarity of (at most `count`) real test images with a caption of theirs, by this `clip`."""
    numbers, captions = test_pairs(prepared, min(count, len(prepared.test)))
    images = real_images(prepared.test, numbers, settings.data.crop, settings.model.image_size)
    return float(clip_similarity(embed(clip, images), clip.embed_text(captions).cpu()).mean())


def as_clip_sees(clip: FrozenClip, images: Tensor) -> Tensor:
    """Images (B,3,S,S) in [-1,1] -> the images whose correct pre-processing is what this `clip` is given."""
    given = clip.preprocess(images.to(clip.mean.device))
    return ((given * clip.std + clip.mean) * 2 - 1).cpu()
