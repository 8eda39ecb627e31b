"""The small CLIP's two transformers, with the names, the first weights and the numbers of open_clip's own.

open_clip brings torchvision, timm and PyTorch's compiler along: two seconds before the first picture of `ratlip
generate` and the first cell of every notebook, none of which the small CLIP uses. So open_clip is imported only where
its pretrained weights are asked for; `tests/unit/test_towers.py` proves the two equal, bit for bit.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class LayerNorm(nn.LayerNorm):
    """Keeps the type of its input in mixed precision, where a GPU computes norms in 32 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class ResidualAttentionBlock(nn.Module):
    """Tokens (B,L,C) -> (B,L,C): x + attention(LN(x)), then x + MLP(LN(x)), the MLP four times as wide."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = LayerNorm(width)
        wide = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(wide))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        tokens, mask = self.ln_1(x), None if attn_mask is None else attn_mask.to(x.dtype)
        x = x + self.attn(tokens, tokens, tokens, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """`layers` blocks one after another. `grad_checkpointing`: see `FrozenClip`."""

    batch_first = True

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.width, self.layers, self.grad_checkpointing = width, layers, False
        self.resblocks = nn.ModuleList([ResidualAttentionBlock(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, stop: int | None = None) -> list[Tensor]:
        """Tokens (B,L,C) -> those after each of the first `stop` blocks (all of them)."""
        after = []
        for block in self.resblocks[:stop]:
            x = checkpoint(block, x, attn_mask, use_reentrant=False) if self.grad_checkpointing else block(x, attn_mask)
            after.append(x)
        return after


def positions(width: int, grid: int) -> Tensor:
    """Fixed sines and cosines (1 + grid^2, width) of a patch's place, column first; zero for the class token."""
    rates = 1 / 10000 ** (np.arange(width // 4, dtype=float) / (width / 4))
    places = np.stack(np.meshgrid(*[np.arange(grid, dtype=np.float32)] * 2)).reshape(2, -1, 1) * rates
    waves = np.concatenate([np.sin(places), np.cos(places)], axis=2)
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), np.concatenate([*waves], axis=1)])).float()


class ImageTower(nn.Module):
    """A ViT on images (B,3,S,S) as `normalise` makes them. The image is the mean of its patch tokens."""

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int, embed_dim: int):
        super().__init__()
        grid, scale = image_size // patch_size, width**-0.5
        self.image_size, self.patch_size, self.grid_size = (image_size,) * 2, (patch_size,) * 2, (grid, grid)
        self.output_dim = embed_dim
        self.seen: Tensor | None = None  # numbers (B,k) of each image's patches that are looked at; None: all of them
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(positions(width, grid), requires_grad=False)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int], stop_early: bool = False, intermediates_only: bool = False
    ) -> dict:
        """As open_clip's: "image_intermediates", tokens (B,C,g,g) after the blocks `indices`, and "image_features".

        `stop_early`: no block after the last of `indices`; `intermediates_only`: without the second.
        """
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(x), 1, -1)
        tokens = torch.cat([first, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        if self.seen is not None:
            seen = self.seen.to(tokens.device)[:, :, None]
            tokens = torch.cat([tokens[:, :1], tokens[:, 1:].take_along_dim(seen, dim=1)], dim=1)
        after = self.transformer(self.ln_pre(tokens), stop=max(indices) + 1 if stop_early else None)
        maps = [after[i][:, 1:].transpose(1, 2).unflatten(2, self.grid_size).contiguous() for i in indices]
        if intermediates_only:
            return {"image_intermediates": maps}
        return {"image_intermediates": maps, "image_features": self.pool(self.ln_post(after[-1])) @ self.proj}

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens (B,1+g*g,C) -> (B,C), the mean of the patches."""
        return tokens[:, 1:].mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B,3,S,S) -> embeddings (B,E), not normalised."""
        return self.forward_intermediates(x, indices=())["image_features"]


class SmallClip(nn.Module):
    """Image tower and text tower; the text is its end token, the largest number of a row, in a causal transformer."""

    def __init__(self, visual: ImageTower, context_length: int, vocab_size: int, width: int, layers: int, heads: int):
        super().__init__()
        self.visual, words = visual, nn.Embedding(vocab_size, width)  # open_clip draws these before the blocks
        self.transformer = Transformer(width, layers, heads)
        self.context_length, self.vocab_size = context_length, vocab_size
        self.token_embedding = words
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, visual.output_dim))
        causal = torch.full((context_length, context_length), -torch.inf).triu(1)
        self.register_buffer("attn_mask", causal, persistent=False)
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        block: Any
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) as `normalise` makes them -> (B,E), not normalised."""
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (N,L) -> (N,E), not normalised."""
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask)[-1])
        return x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)] @ self.text_projection

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B,E) of unit length of images and of texts, and the scale of their logits."""
        image, text = self.encode_image(images), self.encode_text(tokens)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1), self.logit_scale.exp()
