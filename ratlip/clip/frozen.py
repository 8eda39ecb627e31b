"""Frozen CLIP towers: the discriminator's eyes, the generator's bridge, the judge of the text match.

Three sources of weights, one class: downloaded through open_clip ("pretrained"), a local checkpoint of an
open_clip architecture ("file"), or the small CLIP that `ratlip.clip.small` trains on the captions
("train").
"""

from __future__ import annotations

import copy
import hashlib
from functools import cached_property
from typing import Callable, Sequence

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from ratlip.clip.vocabulary import Vocabulary
from ratlip.errors import WeightsError
from ratlip.fast.maps import checkpointed

NORMALISATIONS = ("standard", "published")


def normalise(images: Tensor, mean: Tensor, std: Tensor, mode: str = "standard") -> Tensor:
    """Images (B,3,H,W) in [-1,1] -> what CLIP's first layer takes; `mean`, `std` (1,3,1,1) as CLIP has them.

    "standard": to [0,1], then mean and standard deviation. "published": the published code maps to [0,1]
    twice, so pixels -1/0/1 become 0.5/0.75/1 before mean and std: half the contrast (official.md, difference
    4).
    """
    scale, shift = (0.5, 0.5) if mode == "standard" else (0.25, 0.75)
    return (images * scale + shift - mean) / std


def with_normalisation(clip: FrozenClip, normalisation: str) -> FrozenClip:
    """The same CLIP (its weights are shared), told to normalise pixels in this way."""
    other = copy.copy(clip)
    other.normalisation = normalisation
    return other


class FrozenClip(nn.Module):
    """An open_clip CLIP with a ViT image tower that never learns and never leaves eval mode.

    `model`: an open_clip `CLIP` or `CustomTextCLIP`. `tokenizer`: list of N strings -> LongTensor (N, L).
    `name`: what figures and tables call it. `normalisation`: see `preprocess`.

    Gradients pass through the towers to their inputs; no parameter receives one.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        name: str = "CLIP",
        normalisation: str = "standard",
    ):
        super().__init__()
        visual = getattr(model, "visual", None)
        if not isinstance(visual, VisionTransformer) or visual.grid_size[0] != visual.grid_size[1]:
            raise WeightsError(
                f"{name}: RATLIP reads patch tokens on a square grid, as open_clip's own ViT "
                f"has them, not {type(visual).__name__}; set clip.model: ViT-B-32-quickgelu"
            )
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation must be one of {NORMALISATIONS}, not {normalisation!r}")
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.checkpointing = False  # of the image tower's blocks: see `ratlip.fast.options`
        self.normalisation = normalisation
        self.image_size: int = visual.image_size[0]
        self.grid: int = visual.grid_size[0]
        self.width: int = visual.transformer.width
        self.layers: int = visual.transformer.layers
        self.embed_dim: int = visual.output_dim
        mean = getattr(visual, "image_mean", None) or OPENAI_DATASET_MEAN
        std = getattr(visual, "image_std", None) or OPENAI_DATASET_STD
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenClip:
        """Stay in eval mode: a frozen judge must not change with the mode of the network around it."""
        return super().train(False)

    @cached_property
    def fingerprint(self) -> str:
        """First 12 hex digits of the SHA-256 of all weights (name, shape, values), whatever device they are
        on.
        """
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:12]

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [-1,1] -> CLIP's input, S = `image_size` (else ValueError); see `normalise`."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"{self.name} takes images (B,3,{self.image_size},{self.image_size}), "
                f"not {tuple(images.shape)}: resize them first"
            )
        return normalise(images, self.mean, self.std, self.normalisation)

    def features(self, images: Tensor, blocks: Sequence[int], embedding: bool = True) -> tuple[Tensor, Tensor | None]:
        """Patch tokens after some blocks and, unless not wanted, the image embedding, in one pass.

        `images` (B,3,S,S) in [-1,1]; `blocks`: K block numbers from 0, in any order. Returns (B,K,C,g,g) in
        the order of `blocks` (no `ln_post`), and (B,E), not normalised. Without the embedding, the blocks
        after the last one asked for are not computed.
        """
        if not len(blocks) or min(blocks) < 0 or max(blocks) >= self.layers:
            raise ValueError(f"blocks must be within 0..{self.layers - 1} and not empty, not {list(blocks)}")
        wanted = sorted(set(blocks))
        self.model.visual.transformer.grad_checkpointing = self.checkpointing and torch.is_grad_enabled()
        output = self.model.visual.forward_intermediates(
            self.preprocess(images), indices=wanted, stop_early=not embedding, intermediates_only=not embedding
        )
        taken = dict(zip(wanted, output["image_intermediates"]))
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
        `prompt_blocks[i]` and is dropped after it. Class embedding first, positional embedding, `ln_pre`, all
        blocks; returns the patch tokens of the last block, without `ln_post`, (B,C,g,g). Source: official.md,
        generator ("frozen CLIP").
        """
        if patches.shape[1:] != (self.width, self.grid, self.grid):
            raise ValueError(
                f"{self.name} bridges patches (B,{self.width},{self.grid},{self.grid}), not {tuple(patches.shape)}"
            )
        if prompts.shape != (len(patches), len(prompt_blocks), self.width):
            raise ValueError(
                f"prompts must be ({len(patches)},{len(prompt_blocks)},{self.width}), not {tuple(prompts.shape)}"
            )
        visual = self.model.visual
        first = visual.class_embedding.expand(len(patches), 1, -1)
        tokens = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = visual.ln_pre(tokens + visual.positional_embedding)
        prompt_of = {block: prompts[:, i : i + 1] for i, block in enumerate(prompt_blocks)}
        if len(prompt_of) != len(prompt_blocks) or not set(prompt_of) <= set(range(self.layers)):
            raise ValueError(
                f"prompt_blocks must be different numbers within 0..{self.layers - 1}, not {list(prompt_blocks)}"
            )
        for number, block in enumerate(visual.transformer.resblocks):
            if number in prompt_of:
                tokens = torch.cat([tokens, prompt_of[number]], dim=1)
            again = self.checkpointing and torch.is_grad_enabled()
            tokens = checkpointed(block, tokens) if again else block(tokens)
            tokens = tokens[:, :-1] if number in prompt_of else tokens
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
