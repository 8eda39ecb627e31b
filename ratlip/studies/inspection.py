"""Numbers that notebooks read off the frozen CLIP and the networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.clip.frozen import FrozenClip
from ratlip.clip.pairs import partial
from ratlip.data.batches import real_images
from ratlip.data.generated import GeneratedSet, generated_set
from ratlip.data.prepared import Prepared
from ratlip.data.synthetic import ATTRIBUTES, caption
from ratlip.networks import ConditionalAffine, Generator
from ratlip.training.generation import Run, generate
from ratlip.training.step import sample_latents


def standard_error(share: float, count: int) -> float:
    """Of a share (0 to 1) of `count` trials, after Agresti and Coull (1998), who add two of each outcome."""
    share = (share * count + 2) / (count + 4)
    return float(np.sqrt(share * (1 - share) / (count + 4)))


def parameter_counts(network: nn.Module) -> dict[str, int]:
    """Trainable parameters of each direct part of a network."""
    parts = network.named_children()
    return {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in parts}


def told_apart(clip: FrozenClip, prepared: Prepared, image_size: int, crop: int, seed: int = 0) -> dict[str, float]:
    """For each attribute, the share of test images closer to a true caption than to it with that word changed.

    By `words_told_apart` where captions name a part, else by `one_word_changed`. Guessing gives 0.5.
    """
    test = prepared.test
    images = real_images(test, range(len(test)), crop, image_size).to(clip.mean.device)
    if partial(test):
        return words_told_apart(clip, generated_set(prepared), images, test.attributes or [], seed)
    return one_word_changed(clip, images, test.attributes or [], seed)


@torch.no_grad()
def one_word_changed(
    clip: FrozenClip, images: Tensor, attributes: Sequence[dict[str, str]], seed: int = 0
) -> dict[str, float]:
    """For each attribute, the share of images closer to their caption than to it with that word changed.

    images (N,3,S,S) in [-1,1] of the generated set with their attributes; wordings and wrong values are drawn by
    `seed`. Guessing gives 0.5.
    """
    rng, shares = np.random.default_rng(seed), {}
    embedded = F.normalize(clip.embed_images(images), dim=1)
    for name, values in ATTRIBUTES.items():
        pairs = []
        for known in attributes:
            wording = int(rng.integers(10))
            wrong = rng.choice([value for value in values if value != known[name]])
            pairs += [caption(known, wording), caption({**known, name: wrong}, wording)]
        texts = F.normalize(clip.embed_text(pairs), dim=1).unflatten(0, (-1, 2))
        true, changed = torch.einsum("ne,nke->kn", embedded, texts)
        shares[name] = float((true > changed).float().mean())
    return shares


@torch.no_grad()
def words_told_apart(
    clip: FrozenClip, made: GeneratedSet, images: Tensor, attributes: Sequence[dict[str, str]], seed: int = 0
) -> dict[str, float]:
    """For each attribute, the share of images closer to a caption of theirs than to it with that word changed.

    images (N,3,S,S) in [-1,1] with their attributes, of a set whose captions name a part: that part (with the attribute
    in it), wording and wrong value are drawn by `seed`, so that the changed caption is not true of the image.
    "exchanged" (two objects): the word itself stays, but goes to the other object. Guessing gives 0.5.
    """
    rng, shares = np.random.default_rng(seed), {}
    embedded = F.normalize(clip.embed_images(images), dim=1)
    for change in made.changes:
        pairs = [made.pair(known, change, rng) for known in attributes]
        texts = clip.embed_text([text for pair in pairs for text in (pair.caption, pair.changed)])
        right, changed = torch.einsum("ne,nke->kn", embedded, F.normalize(texts, dim=1).unflatten(0, (-1, 2)))
        shares[change] = float((right > changed).float().mean())
    return shares


def patch_colours(features: Tensor) -> Tensor:
    """Patch features (B,K,C,g,g) -> (B,K,3,g,g) in [-1,1]: the three main directions of each depth as RGB.

    Patches of one colour are alike to the network at that depth. One PCA a depth over all patches of all images; the
    sign of each direction is chosen so that the largest weight is positive.
    """
    batch, depths, _, grid, _ = features.shape
    colours = []
    for tokens in features.detach().float().permute(1, 0, 3, 4, 2).flatten(1, 3):
        centred = tokens - tokens.mean(0)
        directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        values = centred @ (directions * largest.sign()).T
        low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
        colours.append((2 * (values - low) / (high - low).clamp(min=1e-8) - 1).clamp(-1, 1))
    return torch.stack(colours).view(depths, batch, grid, grid, 3).permute(1, 0, 4, 2, 3)


def outputs(network: nn.Module, modules: Iterable[nn.Module], *inputs: Tensor) -> dict[nn.Module, Any]:
    """What these modules give while `network` reads `inputs` once: module -> output, in the order of use."""
    seen: dict[nn.Module, Any] = {}
    hooks = [each.register_forward_hook(lambda module, _, output: seen.update({module: output})) for each in modules]
    try:
        network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def steering(generator: Generator, sentences: Tensor, latent: Tensor) -> list[dict[str, float]]:
    """How far words and latent each move the affine of every layer: one row a layer.

    sentences (N,E), latent (N,Z). "words": the standard deviation of gamma over the sentences with the first latent,
    averaged over channels; "noise": the same over the latents with the first sentence; "size" and "shift": mean
    |gamma - 1| and |beta| over the sentences.
    """
    layers = [module for module in generator.modules() if isinstance(module, ConditionalAffine)]
    parts, rows = [part for layer in layers for part in (layer.gamma, layer.beta)], []
    by_words = outputs(generator, parts, latent[:1].expand_as(latent), sentences)
    by_latent = outputs(generator, parts, latent, sentences[:1].expand_as(sentences))
    for number, layer in enumerate(layers, start=1):
        gamma, beta, other = by_words[layer.gamma], by_words[layer.beta], by_latent[layer.gamma]
        row = {"words": gamma.std(0), "noise": other.std(0), "size": (gamma - 1).abs(), "shift": beta.abs()}
        rows.append({"layer": number, **{name: float(values.mean()) for name, values in row.items()}})
    return rows


@torch.no_grad()
def between_captions(run: Run, first: str, last: str, steps: int = 7, seed: int = 1) -> Tensor:
    """Images (steps,3,S,S) in [-1,1] of one latent, the sentence on a straight line between two captions."""
    ends = run.clip.embed_text([first, last])
    path = torch.lerp(ends[:1], ends[1:], torch.linspace(0, 1, steps, device=ends.device)[:, None])
    latent = sample_latents(seed, 0, 1, run.settings.model.latent_size).expand(steps, -1)
    return generate(run.generator, latent, path.cpu())


@torch.no_grad()
def between_latents(run: Run, caption: str, steps: int = 7, seed: int = 1) -> Tensor:
    """Images (steps,3,S,S) in [-1,1] of one caption, the latent on a great circle of two draws, so never too short."""
    first, last = sample_latents(seed, 0, 2, run.settings.model.latent_size)
    angle = torch.linspace(0, torch.pi / 2, steps)[:, None]
    sentence = run.clip.embed_text([caption]).cpu().expand(steps, -1)
    return generate(run.generator, angle.cos() * first + angle.sin() * last, sentence)


def step_sizes(paths: Tensor) -> list[float]:
    """Root mean square change of the pixels ([-1,1]) between the ends of each of paths (P,steps,3,S,S)."""
    return [float((path[-1] - path[0]).square().mean().sqrt()) for path in paths]
