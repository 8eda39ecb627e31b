"""The generator: a code is fused with the text, passed through the frozen CLIP, and synthesised.

    latent -> code -> Mapper (fusion blocks, frozen CLIP) -> synthesis blocks -> RGB

Source: official.md "Generator" for the layers, paper Method 1 to 3 for the recurrence, the attention and
the bridge through CLIP. Sizes follow from the CLIP model's grid and from the image size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.networks.affine import RAT_INPUTS, AffineFactory, Recurrence, affine_factories, rat_inputs
from ratlip.networks.attention import ConvShuffle

if TYPE_CHECKING:
    from ratlip.clip.frozen import FrozenClip

SCOPES = ("mapper", "generator")
ATTENTIONS = ("shuffle", "norm", "none")
AFFINES = 4  # of one block: two fuses of two affines

ConvFactory = Callable[[int, int], nn.Module]  # channels in, channels out -> convolution after a fuse


class Fuse(nn.Module):
    """affine, LeakyReLU 0.2, affine, LeakyReLU 0.2: the text enters the feature map."""

    def __init__(self, channels: int, affine: AffineFactory):
        super().__init__()
        self.affine0, self.affine1 = affine(channels), affine(channels)

    def forward(self, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """x (B,C,H,W), two conditions (B,D) -> (B,C,H,W)."""
        first, second = conditions
        x = F.leaky_relu(self.affine0(x, first), 0.2)
        return F.leaky_relu(self.affine1(x, second), 0.2)


class FusionBlock(nn.Module):
    """A block of the mapper: x + [conv3x3 C -> C/2, fuse, conv C/2 -> C, fuse](x)."""

    def __init__(self, channels: int, affine: AffineFactory, conv: ConvFactory):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.fuse1 = Fuse(channels // 2, affine)
        self.conv2 = conv(channels // 2, channels)
        self.fuse2 = Fuse(channels, affine)

    def forward(self, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """x (B,C,g,g), four conditions (B,D) -> (B,C,g,g)."""
        h = self.fuse1(self.conv1(x), conditions[:2])
        return x + self.fuse2(self.conv2(h), conditions[2:])


class SynthesisBlock(nn.Module):
    """Resize by nearest to `size`, then shortcut(x) + [fuse, conv, fuse, conv](x)."""

    def __init__(self, in_channels: int, out_channels: int, size: int, affine: AffineFactory, conv: ConvFactory):
        super().__init__()
        self.size = size
        self.fuse1 = Fuse(in_channels, affine)
        self.conv1 = conv(in_channels, out_channels)
        self.fuse2 = Fuse(out_channels, affine)
        self.conv2 = conv(out_channels, out_channels)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """x (B,C_in,s,s), four conditions (B,D) -> (B,C_out,size,size)."""
        x = F.interpolate(x, size=(self.size, self.size))
        h = self.conv1(self.fuse1(x, conditions[:2]))
        return self.shortcut(x) + self.conv2(self.fuse2(h, conditions[2:]))


class Mapper(nn.Module):
    """Fusion blocks, then the bridge through the frozen CLIP with learned prompts (paper, Method 3).

    f = conv5x5(fusion blocks(code));  output = conv5x5(f + scale * CLIP(f, prompts)),
    prompts = linear(latent, sentence): one token for each CLIP block in `prompt_blocks`.
    """

    def __init__(
        self,
        clip: FrozenClip,
        fusion_blocks: Sequence[FusionBlock],
        channels: int,
        out_channels: int,
        condition_size: int,
        prompt_blocks: Sequence[int],
        scale: float,
    ):
        super().__init__()
        self._clip, self.prompt_blocks, self.scale = _Aside(clip), tuple(prompt_blocks), scale
        self.fusion_blocks = nn.ModuleList(fusion_blocks)
        self.to_clip = nn.Conv2d(channels, clip.width, 5, padding=2)
        self.prompts = nn.Linear(condition_size, len(self.prompt_blocks) * clip.width)
        self.from_clip = nn.Conv2d(clip.width, out_channels, 5, padding=2)

    def forward(self, code: Tensor, condition: Tensor, conditions: Sequence[Sequence[Tensor]]) -> Tensor:
        """code (B,C,g,g), condition (B,D), four `conditions` (B,D) for each block -> (B,C_out,g,g)."""
        x = code
        for block, four in zip(self.fusion_blocks, conditions, strict=True):
            x = block(x, four)
        x = self.to_clip(x)
        prompts = self.prompts(condition).view(len(x), len(self.prompt_blocks), x.shape[1])
        mapped = self._clip.value.bridge(x, prompts, self.prompt_blocks)
        return self.from_clip(x + self.scale * mapped)


class Generator(nn.Module):
    """Text and latent to image. The defaults are the published sizes with the paper's recurrence.

    clip: the frozen CLIP (`ratlip.clip.FrozenClip`); used are its `image_size`, `grid`, `width`,
        `embed_dim` and `bridge`. It is held aside: it is no submodule, so `parameters()` and `state_dict()`
        hold the generator's own tensors alone, copies share it, and the caller moves it to the device.
    conditioning: "cat", "rat" (the paper) or "rat-official" (the published code); see `affine`.
    rat_scope: "mapper" (as published) or "generator": the layers that are recurrent; others use CAT.
    hidden_size: of the LSTM, at least 1.
    rat_input: what recurrent affines read, see `affine.rat_inputs`. The scale of "scaled" is the buffer `state_scale`,
        NaN until `training.start.match_spread` sets it.
    attention: "shuffle", "norm" (its convolution and norm without the attention) or "none" (plain conv3x3
        with bias, as in GALIP).
    image_size: side of the generated images, by default the CLIP model's.

    Maps between the parts can be read by forward hooks on `code`, `mapper.fusion_blocks[i]`, `mapper` and
    `synthesis_blocks[i]`. Raises ValueError for settings outside these choices.
    """

    def __init__(
        self,
        clip: FrozenClip,
        *,
        image_size: int | None = None,
        conditioning: str = "rat",
        rat_scope: str = "generator",
        hidden_size: int = 64,
        rat_input: str = "state",
        attention: str = "shuffle",
        attention_groups: int = 8,
        latent_size: int = 100,
        base_channels: int = 64,
        code_channels: int = 64,
        mapper_blocks: int = 4,
        prompt_blocks: Sequence[int] = tuple(range(1, 9)),
        bridge_scale: float = 0.1,
    ):
        super().__init__()
        condition_size = latent_size + clip.embed_dim
        affines = affine_factories(condition_size, hidden_size, rat_input)
        given = {"conditioning": conditioning, "rat_scope": rat_scope, "rat_input": rat_input, "attention": attention}
        for (name, value), choices in zip(given.items(), (affines, SCOPES, RAT_INPUTS, ATTENTIONS), strict=True):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(repr, choices))}")
        self.latent_size, self.rat_input = latent_size, rat_input
        self.code_shape = (code_channels, clip.grid, clip.grid)
        convs: dict[str, ConvFactory] = {
            "shuffle": partial(ConvShuffle, groups=attention_groups),
            "norm": partial(ConvShuffle, groups=0),
            "none": partial(nn.Conv2d, kernel_size=3, padding=1),
        }
        recurrent, conv = affines[conditioning], convs[attention]

        sizes = synthesis_sizes(clip.grid, image_size or clip.image_size)
        widths = synthesis_channels(base_channels, len(sizes))
        self.code = nn.Linear(latent_size, code_channels * clip.grid**2)
        blocks = [FusionBlock(code_channels, recurrent, conv) for _ in range(mapper_blocks)]
        self.mapper = Mapper(clip, blocks, code_channels, widths[0], condition_size, prompt_blocks, bridge_scale)
        affine = recurrent if rat_scope == "generator" else affines["cat"]
        self.synthesis_blocks = nn.ModuleList(
            SynthesisBlock(before, after, size, affine, conv)
            for before, after, size in zip(widths[:-1], widths[1:], sizes, strict=True)
        )
        self.to_rgb = nn.Conv2d(widths[-1], 3, 3, padding=1)

        self.recurrence: Recurrence | None = None
        if conditioning == "rat":
            steps = AFFINES * (mapper_blocks + (len(sizes) if rat_scope == "generator" else 0))
            self.recurrence = Recurrence(
                sentence_size=clip.embed_dim, latent_size=latent_size, hidden_size=hidden_size, steps=steps
            )
        self.state_scale: Any  # a number that is NaN until it is set, so that none goes without it unseen; or None
        scaled = self.recurrence is not None and rat_input == "scaled"
        self.register_buffer("state_scale", torch.tensor(math.nan) if scaled else None)

    def forward(self, latent: Tensor, sentence: Tensor) -> Tensor:
        """latent (B,Z) standard normal, sentence (B,E) raw CLIP text embedding -> images (B,3,S,S).

        The images are meant for [-1,1] but not limited to it (no tanh, as published): clamp to show them.
        """
        condition = torch.cat((latent, sentence), dim=1)
        every = self.conditions(latent, sentence)
        conditions = [every[i : i + AFFINES] for i in range(0, len(every), AFFINES)]
        mapped = len(self.mapper.fusion_blocks)
        x = self.mapper(self.code(latent).unflatten(1, self.code_shape), condition, conditions[:mapped])
        for block, four in zip(self.synthesis_blocks, conditions[mapped:], strict=True):
            x = block(x, four)
        return self.to_rgb(F.leaky_relu(x, 0.2))

    def conditions(self, latent: Tensor, sentence: Tensor) -> list[Tensor]:
        """What each affine reads, (B,D), in the order of use: RAT's inputs as far as it reaches, then CAT's."""
        condition = torch.cat((latent, sentence), dim=1)
        states = self.recurrence(latent, sentence) if self.recurrence else []
        read = rat_inputs(states, condition, self.rat_input, self.state_scale)
        affines = AFFINES * (len(self.mapper.fusion_blocks) + len(self.synthesis_blocks))
        return [*read, *[condition] * (affines - len(read))]


def synthesis_sizes(grid: int, image_size: int) -> list[int]:
    """Sides of the maps after each synthesis block: powers of two from `grid` up, the last `image_size`.

    7, 224 -> [8, 16, 32, 64, 128, 224] (published); 8, 32 -> [8, 16, 32].
    """
    if image_size < grid:
        raise ValueError(f"image_size {image_size} is smaller than the CLIP grid: choose at least {grid}")
    sizes = [1 << (grid - 1).bit_length()]
    while sizes[-1] < image_size:
        sizes.append(2 * sizes[-1])
    return [min(size, image_size) for size in sizes]


def synthesis_channels(base: int, blocks: int) -> list[int]:
    """Channels before the first and after each synthesis block: doubling from the end, at most 8 * base.

    64, 6 -> [512, 512, 512, 512, 256, 128, 64] (published).
    """
    return [base * min(8, 2**i) for i in range(blocks, -1, -1)]


class _Aside:
    """Holds a CLIP so that its owner does not register it; copies of the owner share it."""

    def __init__(self, value: FrozenClip):
        self.value = value

    def __deepcopy__(self, memo) -> _Aside:
        return self
