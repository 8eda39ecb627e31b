"""The discriminator: judges frozen CLIP features of several depths against a sentence (paper, Method 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """shortcut(x) + gamma * res(x) [+ beta * feature], gamma and beta starting at `gate` (0: official.md).

    res: conv3x3, LeakyReLU 0.2, conv3x3, LeakyReLU 0.2, no bias. The shortcut is a 1x1 convolution where channels
    differ. `unused_shortcut` builds one where they are equal too, as the published code does, which then never uses
    it (difference 11).
    """

    def __init__(self, in_channels: int, out_channels: int, *, feature: bool, unused_shortcut: bool, gate: float = 0.0):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((1,), gate))
        self.beta = nn.Parameter(torch.full((1,), gate)) if feature else None
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.LeakyReLU(0.2),
        )
        self.mixes = in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if self.mixes or unused_shortcut else None

    def forward(self, x: Tensor, feature: Tensor | None = None) -> Tensor:
        """x (B,C_in,g,g), feature (B,C_out,g,g) for blocks that take one -> (B,C_out,g,g)."""
        shortcut = self.shortcut(x) if self.mixes and self.shortcut is not None else x
        h = shortcut + self.gamma * self.residual(x)
        return h if feature is None or self.beta is None else h + self.beta * feature


class Discriminator(nn.Module):
    """Scores how real CLIP features look and how well they fit a sentence (official.md, Discriminator).

    x = f_0;  x = x + gamma_i * res_i(x) + beta_i * f_i, i = 1 ..;  x = shortcut(x) + gamma * res(x);
    logit = conv(LeakyReLU 0.2(conv(concat(x, sentence at every position)))), both without padding and bias.

    grid, clip_width, sentence_size: of the CLIP model (7, 768, 512 for ViT-B/32).
    feature_blocks: the CLIP blocks the features come from; here only their number counts.
    gate: what gamma and beta of all blocks start at; 0 as published. A training of minutes does not open gates
        that start shut, and the discriminator then judges by the first features alone.
    unused_shortcuts: build the 1x1 convolutions that the published code builds and never uses.
    """

    def __init__(
        self,
        *,
        grid: int,
        clip_width: int,
        sentence_size: int,
        feature_blocks: Sequence[int] = (1, 4, 8),
        d_channels: int = 512,
        logit_channels: int = 128,
        unused_shortcuts: bool = False,
        gate: float = 0.0,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(clip_width, clip_width, feature=True, unused_shortcut=unused_shortcuts, gate=gate)
            for _ in feature_blocks[1:]
        )
        self.main = ResidualBlock(clip_width, d_channels, feature=False, unused_shortcut=unused_shortcuts, gate=gate)
        # The two kernels together shrink the grid to one position: 7 -> 4 -> 1.
        first = (grid + 1) // 2
        self.logit = nn.Sequential(
            nn.Conv2d(d_channels + sentence_size, logit_channels, first, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(logit_channels, 1, grid - first + 1, bias=False),
        )

    def forward(self, features: Tensor, *sentences: Tensor) -> Tensor | tuple[Tensor, ...]:
        """features (B,K,C,g,g), sentence (B,E) -> logits (B,), unbounded, larger is more real.

        Given several sentence batches, returns as many logit tensors.
        """
        logits = tuple(self.head(self.trunk(features), sentence) for sentence in sentences)
        return logits[0] if len(logits) == 1 else logits

    def trunk(self, features: Tensor) -> Tensor:
        """All layers before the sentence enters: features (B,K,C,g,g) -> (B,C_out,g,g)."""
        x, *others = features.unbind(dim=1)
        if len(others) != len(self.blocks):
            built = f"the discriminator was built for {len(self.blocks) + 1}: tap as many as its feature_blocks has"
            raise ValueError(f"features come from {features.shape[1]} CLIP blocks, {built}")
        for block, feature in zip(self.blocks, others, strict=True):
            x = block(x, feature)
        return self.main(x)

    def head(self, x: Tensor, sentence: Tensor) -> Tensor:
        """x (B,C,g,g) of `trunk`, sentence (B,E) -> logits (B,)."""
        everywhere = sentence[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.logit(torch.cat((x, everywhere), dim=1)).flatten()
