"""What a training may trade for time or memory, each a setting of `training` and off by default.

`checkpointing`: maps within synthesis blocks and CLIP blocks are made again for the backward pass, not kept: less
memory, more time. `channels_last`: the convolutions' weights lie with the channels last. `cached_features`: a real
image goes through CLIP at its first visit only. The results differ from the default's by rounding alone. There is no
option for torch.compile: it was measured, and was slower and wrong (reports/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ratlip.errors import SettingsError

if TYPE_CHECKING:
    from ratlip.clip.frozen import FrozenClip
    from ratlip.data.prepared import Split
    from ratlip.networks import Discriminator, Generator
    from ratlip.settings import DataSettings, TrainingSettings


def apply(settings: TrainingSettings, generator: Generator, discriminator: Discriminator, *clips: FrozenClip) -> None:
    """Make the networks of a training work as `settings` say, in place; keys and shapes of tensors stay."""
    for part in (*generator.synthesis_blocks, *clips):
        part.checkpointing = settings.checkpointing
    if settings.channels_last:
        for network in (generator, discriminator):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class RealFeatures:
    """CLIP's features of real images, made at an image's first visit and kept in the computer's memory.

    Only where each visit shows the same pixels: crop == resize, no flip, square images; else SettingsError. Takes
    4 * K * C * g * g bytes an image (ViT-B/32, three blocks: 0.45 MB).
    """

    def __init__(self, clip: FrozenClip, blocks: Sequence[int], split: Split, data: DataSettings):
        if data.crop != data.resize or data.flip:
            mend = f"data.crop={data.crop} must be data.resize={data.resize}, and data.flip false"
            raise SettingsError(f"training.cached_features keeps one view of each image: {mend}")
        self.clip, self.blocks, self.split, self.crop = clip, blocks, split, data.crop
        self.rows: dict[int, Tensor] = {}

    def __call__(self, real: Tensor, numbers: Tensor) -> Tensor:
        """real (B,3,S,S) in [-1,1], the images with these numbers (B,) -> (B,K,C,g,g) on their device."""
        wanted = numbers.tolist()
        new = [position for position, number in enumerate(wanted) if number not in self.rows]
        for number in (wanted[position] for position in new):
            height, width = self.split.image(number).shape[:2]
            if height != self.crop or width != self.crop:
                cut = f"of which each visit cuts another square of {self.crop} px; switch it off"
                raise SettingsError(f"training.cached_features: image {number} has {width} x {height} px, {cut}")
        if new:
            features, _ = self.clip.features(real[new], self.blocks, embedding=False)
            self.rows |= {wanted[position]: row for position, row in zip(new, features.cpu(), strict=True)}
        return torch.stack([self.rows[number] for number in wanted]).to(real.device)
