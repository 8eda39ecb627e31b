"""The fast forms of the networks' modules: what `accelerate` puts in place of the plain ones of `ratlip.networks`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.fast.maps import Moments, ShuffledGates, checkpointed, resized_conv3x3, usable
from ratlip.networks.affine import ConditionalAffine, OfficialRecurrentAffine, Recurrence
from ratlip.networks.attention import ConvShuffle, ShuffleAttention
from ratlip.networks.discriminator import Discriminator, ResidualBlock
from ratlip.networks.generator import Fuse, SynthesisBlock


class FastAffine(ConditionalAffine):
    """gamma * x + beta in one pass over the map."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.gamma(condition), self.beta(condition)
        return torch.addcmul(beta[:, :, None, None], gamma[:, :, None, None], x)


class FastOfficialAffine(OfficialRecurrentAffine, FastAffine):
    """The same for the affine with an LSTM of its own, whose `super().forward` is `FastAffine`'s here."""


class FastRecurrence(Recurrence):
    """The product of sentence and input weights is the same at all steps: made once."""

    def forward(self, latent: Tensor, sentence: Tensor) -> list[Tensor]:
        cell, states = self.cell, []
        h, c = self.initial(latent).chunk(2, dim=1)
        text = F.linear(sentence, cell.weight_ih, cell.bias_ih)
        for _ in range(self.steps):
            gates = text + F.linear(h, cell.weight_hh, cell.bias_hh)
            write, keep, new, read = gates.chunk(4, dim=1)  # i, f, g, o in PyTorch's order
            c = keep.sigmoid() * c + write.sigmoid() * new.tanh()
            h = read.sigmoid() * c.tanh()
            states.append(h)
        return states


class FastFuse(Fuse):
    """Activations take the place of the map before them."""

    def forward(self, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        for affine, condition in zip((self.affine0, self.affine1), conditions, strict=True):
            x = F.leaky_relu(affine(x, condition), 0.2, inplace=True)
        return x


class FastShuffleAttention(ShuffleAttention):
    """Fewer passes: GroupNorm of one channel a group only shifts and scales, as does what follows up to the sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        if not usable(x) or self.groups % 2:
            return super().forward(x)
        parts = x.unflatten(1, (self.groups, 2, -1))
        channel, spatial = parts.unbind(2)
        gate = torch.sigmoid(self.channel_weight * channel.mean(dim=(3, 4), keepdim=True) + self.channel_bias)
        variance, mean = Moments.apply(spatial)
        norm = self.norm
        scale = self.spatial_weight * norm.weight[:, None, None] * torch.rsqrt(variance + norm.eps)
        shift = self.spatial_weight * norm.bias[:, None, None] + self.spatial_bias - scale * mean
        return ShuffledGates.apply(parts, gate, scale, shift)


class FastConvShuffle(ConvShuffle):
    """Takes the map before it is resized; the activation takes the place of the map before it."""

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        return self.attention(F.leaky_relu(self.norm(_conv(self.conv, x, size)), 0.01, inplace=True))


class FastSynthesisBlock(SynthesisBlock):
    """The first fuse and the shortcut come before the resizing.

    Resizing by nearest only copies positions, and neither of them mixes positions: the same numbers from a quarter of
    the positions. With `checkpointing`, maps within are made again for the backward pass.
    """

    checkpointing = False  # see `ratlip.fast.options`

    def forward(self, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        again = self.checkpointing and torch.is_grad_enabled()
        return checkpointed(self, x, conditions, forward=self._forward) if again else self._forward(x, conditions)

    def _forward(self, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        h = _conv(self.conv1, self.fuse1(x, conditions[:2]), self.size)
        h = self.conv2(self.fuse2(h, conditions[2:]))
        x = self.shortcut(x)
        return (x if x.shape[-1] == self.size else F.interpolate(x, size=(self.size, self.size))) + h


def _conv(conv: nn.Module, x: Tensor, size: int | None) -> Tensor:
    """conv3x3 or conv-shuffle of `x` resized by nearest to `size`; None: as it is."""
    if type(conv) is nn.Conv2d:
        return conv(x) if size is None else resized_conv3x3(x, conv.weight, conv.bias, size)
    return conv(x, size)


class FastResidualBlock(ResidualBlock):
    """Each gate in one pass over the map."""

    def forward(self, x: Tensor, feature: Tensor | None = None) -> Tensor:
        shortcut = self.shortcut(x) if self.mixes and self.shortcut is not None else x
        h = torch.addcmul(shortcut, self.gamma, self.residual(x))
        return h if feature is None or self.beta is None else torch.addcmul(h, self.beta, feature)


class FastDiscriminator(Discriminator):
    """Given several sentence batches, the features are worked through once."""

    def forward(self, features: Tensor, *sentences: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.trunk(features)
        logits = tuple(self.head(x, sentence) for sentence in sentences)
        return logits[0] if len(logits) == 1 else logits


FAST: dict[type[nn.Module], type[nn.Module]] = {
    ConditionalAffine: FastAffine,
    OfficialRecurrentAffine: FastOfficialAffine,
    Recurrence: FastRecurrence,
    Fuse: FastFuse,
    ShuffleAttention: FastShuffleAttention,
    ConvShuffle: FastConvShuffle,
    SynthesisBlock: FastSynthesisBlock,
    ResidualBlock: FastResidualBlock,
    Discriminator: FastDiscriminator,
}
