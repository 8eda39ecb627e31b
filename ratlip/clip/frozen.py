"""The frozen CLIP: features for the discriminator, the bridge of the generator, embeddings for loss and scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ratlip.cache import weights_digest
from ratlip.clip.vocabulary import Vocabulary
from ratlip.errors import WeightsError

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of [0,1]
READ = {"grid_size", "class_embedding", "positional_embedding", "ln_pre", "transformer"}  # parts of a ViT
SCALE_AND_SHIFT = {"standard": (0.5, 0.5), "published": (0.25, 0.75)}  # of pixels in [-1,1]


def normalise(images: Tensor, mean: Tensor, std: Tensor, mode: str = "standard") -> Tensor:
    """Images (B,3,H,W) in [-1,1] -> what CLIP's first layer takes; `mean`, `std` (1,3,1,1) as CLIP has them.

    "standard": to [0,1], then mean and standard deviation. "published": the published code maps to [0,1] twice, so
    pixels -1/0/1 become 0.5/0.75/1 before mean and std: half the contrast (difference 4).
    """
    scale, shift = SCALE_AND_SHIFT[mode]
    return (images * scale + shift - mean) / std


class FrozenClip(nn.Module):
    """A CLIP with a ViT image tower that never learns and never leaves eval mode.

    `model`: a `SmallClip`, or open_clip's `CLIP` or `CustomTextCLIP`. `tokenizer`: list of N strings -> LongTensor
    (N,L). `name`: what figures and tables call it. `normalisation`: see `normalise`. `checkpointing`: the blocks of the
    image tower are computed again in the backward pass: less memory, more time. Gradients reach the towers' inputs, no
    parameter.
    """

    model: Any
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, tokenizer: Callable, name: str = "CLIP", normalisation: str = "standard"):
        super().__init__()
        visual: Any = getattr(model, "visual", None)
        if any(not hasattr(visual, part) for part in READ) or visual.grid_size[0] != visual.grid_size[1]:
            raise WeightsError(
                f"{name}: RATLIP reads patch tokens on a square grid, as open_clip's own ViT has them, not "
                f"{type(visual).__name__}; set clip.model: ViT-B-32-quickgelu"
            )
        self.model = model.requires_grad_(False)
        self.tokenizer, self.name, self.normalisation = tokenizer, name, normalisation
        self.checkpointing = False
        self.image_size: int = visual.image_size[0]
        self.grid: int = visual.grid_size[0]
        self.width: int = visual.transformer.width
        self.layers: int = visual.transformer.layers
        self.embed_dim: int = visual.output_dim
        for name, default in (("mean", OPENAI_MEAN), ("std", OPENAI_STD)):
            values = getattr(visual, f"image_{name}", None) or default
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenClip:
        """Stay in eval mode, whatever the mode of the network around it."""
        return super().train(False)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits of all weights (name, shape, values), whatever device they are on."""
        return weights_digest(self.model)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [-1,1] -> CLIP's input, S = `image_size` (else ValueError); see `normalise`."""
        size, shape = self.image_size, tuple(images.shape)
        if shape[1:] != (3, size, size):
            raise ValueError(f"{self.name} takes images (B,3,{size},{size}), not {shape}: resize them first")
        return normalise(images, self.mean, self.std, self.normalisation)

    def features(self, images: Tensor, blocks: Sequence[int], embedding: bool = True) -> tuple[Tensor, Any]:
        """Patch tokens after some blocks and, unless not wanted, the image embedding, in one pass.

        `images` (B,3,S,S) in [-1,1]; `blocks`: K block numbers from 0, in any order. Returns (B,K,C,g,g) in the order
        of `blocks` (no `ln_post`), and (B,E), not normalised. Without the embedding (None), the blocks after the
        last one asked for are not computed.
        """
        if not len(blocks) or min(blocks) < 0 or max(blocks) >= self.layers:
            raise ValueError(f"blocks must be within 0..{self.layers - 1} and not empty, not {list(blocks)}")
        wanted, visual = sorted(set(blocks)), self.model.visual
        visual.transformer.grad_checkpointing = self.checkpointing and torch.is_grad_enabled()
        output = visual.forward_intermediates(
            self.preprocess(images), indices=wanted, stop_early=not embedding, intermediates_only=not embedding
        )
        taken = dict(zip(wanted, output["image_intermediates"], strict=True))
        return torch.stack([taken[block] for block in blocks], dim=1), output.get("image_features")

    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [-1,1] -> image embeddings (B,E), not normalised."""
        return self.model.encode_image(self.preprocess(images))

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """N strings -> text embeddings (N,E) float32, not normalised, on CLIP's device, without gradient."""
        device, texts = self.mean.device, list(texts)
        parts = [torch.empty(0, self.embed_dim, device=device)]
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(texts[start : start + batch_size]).to(device)
            parts.append(self.model.encode_text(tokens).float())
        return torch.cat(parts)

    def unknown_words(self, text: str) -> list[str]:
        """Words of `text` that this CLIP cannot read (open_clip's own tokenizers can spell out any)."""
        return self.tokenizer.unknown(text) if isinstance(self.tokenizer, Vocabulary) else []

    def bridge(self, patches: Tensor, prompts: Tensor, prompt_blocks: Sequence[int]) -> Tensor:
        """Send a map of patch tokens through the whole image tower, with learned prompts on the way.

        `patches` (B,C,g,g), C = `width`; `prompts` (B,P,C): prompt i joins as the last token of block
        `prompt_blocks[i]` and is dropped after it. Class embedding first, positional embedding, `ln_pre`, all blocks;
        returns the patch tokens of the last block, without `ln_post`, (B,C,g,g). Source: official.md, "Generator".
        """
        shape, numbers = (self.width, self.grid, self.grid), list(prompt_blocks)
        fits = patches.shape[1:] == shape and prompts.shape == (len(patches), len(numbers), self.width)
        if not fits or len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(self.layers)):
            raise ValueError(
                f"{self.name} bridges (B,{self.width},{self.grid},{self.grid}) with prompts (B,P,{self.width}) in P "
                f"blocks of 0..{self.layers - 1}, not {tuple(patches.shape)} with {tuple(prompts.shape)} in {numbers}"
            )
        visual, prompt_of = self.model.visual, {block: prompts[:, i : i + 1] for i, block in enumerate(numbers)}
        first = visual.class_embedding.expand(len(patches), 1, -1)
        tokens = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = visual.ln_pre(tokens + visual.positional_embedding)
        again = self.checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(visual.transformer.resblocks):
            x = torch.cat([tokens, prompt_of[number]], dim=1) if number in prompt_of else tokens
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if again else block(x)
            tokens = x[:, :-1] if number in prompt_of else x
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))


def with_normalisation(clip: FrozenClip, normalisation: str) -> FrozenClip:
    """The same CLIP (its weights are shared) that normalises pixels in this way."""
    other = copy.copy(clip)
    other.normalisation = normalisation
    return other


def shuffled(clip: FrozenClip, seed: int = 0) -> FrozenClip:
    """A copy of `clip` that knows nothing: the values of each tensor of its image tower in random order.

    So its activations have about the size of those of `clip`, which fresh weights would not give.
    """
    other = copy.deepcopy(clip)
    other.__dict__.pop("fingerprint", None)
    other.name = f"{clip.name}, weights shuffled"
    draw = torch.Generator().manual_seed(seed)
    for weight in other.model.visual.parameters():
        order = torch.randperm(weight.numel(), generator=draw).to(weight.device)
        weight.data = weight.data.flatten()[order].view_as(weight)
    return other
