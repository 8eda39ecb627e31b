"""The fast forms of the networks' modules: what `accelerate` puts in place of the plain ones of `ratlip.networks`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.fast.maps import Moments, ShuffledGates, checkpointed, resized_conv3x3, usable
from ratlip.networks.affine import ConditionalAffine, OfficialRecurrentAffine, Recurrence
from ratlip.networks.attention import ConvShuffle, ShuffleAttention
from ratlip.networks.discriminator import Discriminator, ResidualBlock
from ratlip.networks.generator import Fuse, Generator, SynthesisBlock


class FastAffine(ConditionalAffine):
    """gamma * x + beta in one pass over the map."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.gamma(condition), self.beta(condition)
        return torch.addcmul(beta[:, :, None, None], gamma[:, :, None, None], x)


class FastOfficialAffine(OfficialRecurrentAffine, FastAffine):
    """The same for the affine with an LSTM of its own, whose `super().forward` is `FastAffine`'s here."""


class FastRecurrence(Recurrence):
    """All steps in one call of the library's LSTM, whose input is the same at each."""

    def forward(self, latent: Tensor, sentence: Tensor) -> list[Tensor]:
        if not usable(sentence):
            return super().forward(latent, sentence)
        cell, start = self.cell, self.initial(latent)[None].chunk(2, dim=2)
        weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
        repeated = sentence.expand(self.steps, -1, -1)
        states, *_ = torch.lstm(repeated, start, weights, True, 1, 0.0, self.training, False, False)
        return list(states.unbind())


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


class FastGenerator(Generator):
    """The last convolution as the transposed one with its kernel turned round, on a map with the channels last.

    The library's convolution to three channels is slow in the backward pass; as a transposed convolution from three
    it is the forward pass of what it is good at.
    """

    def rgb(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not usable(x):
            return super().rgb(x)
        x, weight = x.contiguous(memory_format=torch.channels_last), self.to_rgb.weight
        turned = weight.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, turned, self.to_rgb.bias, padding=1).contiguous()


class FastResidualBlock(ResidualBlock):
    """Each gate in one pass over the map, activations in the place of the map before them."""

    def forward(self, x: Tensor, feature: Tensor | None = None) -> Tensor:
        return self.traced(x, feature)[0]

    def traced(self, x: Tensor, feature: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output and the maps after both activations, whose signs `transposed` needs."""
        shortcut = self.shortcut(x) if self.mixes and self.shortcut is not None else x
        first = F.leaky_relu(self.residual[0](x), 0.2, inplace=True)
        second = F.leaky_relu(self.residual[2](first), 0.2, inplace=True)
        h = torch.addcmul(shortcut, self.gamma, second)
        h = h if feature is None or self.beta is None else torch.addcmul(h, self.beta, feature)
        return h, first, second

    def transposed(self, grad: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Gradient for the output -> gradient for `x`, as a forward pass that can be differentiated."""
        within = self.gamma * grad
        for name, activated in (("2.weight", second), ("0.weight", first)):
            within = F.conv_transpose2d(sloped(within, activated), self.residual.get_parameter(name), padding=1)
        if self.mixes and self.shortcut is not None:
            grad = F.conv_transpose2d(grad, self.shortcut.weight)
        return within + grad


class FastDiscriminator(Discriminator):
    """Features are worked through once for all sentences, up to where a sentence enters.

    A sentence is the same at every position: its part of the first kernel, summed over positions, is a small product.
    """

    def forward(self, features: Tensor, *sentences: Tensor) -> Tensor | tuple[Tensor, ...]:
        of_map, of_sentence = self.kernels()
        seen = F.conv2d(self.trunk(features), of_map)
        logits = tuple(self.judged(seen, F.linear(sentence, of_sentence))[0] for sentence in sentences)
        return logits[0] if len(logits) == 1 else logits

    def kernels(self) -> tuple[Tensor, Tensor]:
        """The parts of the head's first kernel: of the map (L,C,k,k), and of the sentence, summed up, (L,E)."""
        weight, channels = self.logit.get_parameter("0.weight"), self.main.residual.get_parameter("2.weight").shape[0]
        of_map, of_sentence = weight.split((channels, weight.shape[1] - channels), dim=1)
        return of_map, of_sentence.sum(dim=(2, 3))

    def judged(self, seen: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """What the first kernel makes of the map (B,L,s,s) and of the sentence (B,L) -> logits (B,), hidden map."""
        hidden = F.leaky_relu(seen + read[:, :, None, None], 0.2, inplace=True)
        return F.linear(hidden.flatten(1), self.logit.get_parameter("2.weight").flatten(1)).flatten(), hidden


def sloped(grad: Tensor, activated: Tensor) -> Tensor:
    """Gradient before a LeakyReLU 0.2 from the one after it; differentiable for `grad`. Signs stay under LeakyReLU."""
    return torch.ops.aten.leaky_relu_backward(grad, activated.detach(), 0.2, True)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    ConditionalAffine: FastAffine,
    OfficialRecurrentAffine: FastOfficialAffine,
    Recurrence: FastRecurrence,
    Fuse: FastFuse,
    ShuffleAttention: FastShuffleAttention,
    ConvShuffle: FastConvShuffle,
    SynthesisBlock: FastSynthesisBlock,
    Generator: FastGenerator,
    ResidualBlock: FastResidualBlock,
    Discriminator: FastDiscriminator,
}
