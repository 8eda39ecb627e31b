"""The fast forms of the networks' modules: what `accelerate` puts in place of the plain ones of `ratlip.networks`."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.fast.maps import Affines, NormGates, checkpointed, conv3x3, usable
from ratlip.fast.products import as_it_is, conv1x1
from ratlip.networks.affine import ConditionalAffine, OfficialRecurrentAffine, Recurrence
from ratlip.networks.attention import ConvShuffle, ShuffleAttention
from ratlip.networks.discriminator import Discriminator, ResidualBlock
from ratlip.networks.generator import Fuse, SynthesisBlock


class FastAffine(ConditionalAffine):
    """gamma * x + beta in one pass over the map."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.scale_and_shift(condition)
        return torch.addcmul(beta, gamma, x)

    def scale_and_shift(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """condition (B,D) -> gamma, beta (B,C,1,1)."""
        return self.gamma(condition)[:, :, None, None], self.beta(condition)[:, :, None, None]


class FastOfficialAffine(OfficialRecurrentAffine, FastAffine):
    """The same for the affine with an LSTM of its own."""

    forward = FastAffine.forward

    def scale_and_shift(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        _, (state, _) = self.lstm(condition[None])
        return super().scale_and_shift(state[0])


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
    """Both affines and activations as one function, which keeps no map between them."""

    def forward(self, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        affines: tuple[Any, Any] = self.affine0, self.affine1
        if not usable(x) or not all(isinstance(affine, FastAffine) for affine in affines):
            return super().forward(x, conditions)
        pairs = (affine.scale_and_shift(condition) for affine, condition in zip(affines, conditions, strict=True))
        return Affines.apply(x, *(each for pair in pairs for each in pair))


class FastShuffleAttention(ShuffleAttention):
    """Both halves' gates as one equation, for `NormGates`."""

    def gates(self) -> tuple[Tensor, Tensor, Tensor]:
        """of_mean, of_norm, constant of `NormGates`, (C) each, for channels that lie as they come out: shuffled."""
        of_norm = self.spatial_weight.flatten() * self.norm.weight
        constant = self.spatial_bias.flatten() + self.spatial_weight.flatten() * self.norm.bias
        none = torch.zeros_like(of_norm)
        halves = (self.channel_weight.flatten(), none), (none, of_norm), (self.channel_bias.flatten(), constant)
        of_mean, of_norm, constant = (shuffled(torch.cat(pair).repeat(self.groups)) for pair in halves)
        return of_mean, of_norm, constant


def shuffled(x: Tensor) -> Tensor:
    """What belongs to channels (C,...) in the order of the shuffled channels, in two groups."""
    return x.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


class FastConvShuffle(ConvShuffle):
    """Takes the map before it is resized. The channels come shuffled out of the convolution, by its kernels' order."""

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        norm, attention = self.norm, cast(Any, self.attention)
        if not usable(x):
            return super().forward(x if size is None else F.interpolate(x, size=(size, size)))
        if type(norm) is not nn.BatchNorm2d:  # one whose batch lies in several processes
            return attention(F.leaky_relu(norm(conv3x3(x, self.conv.weight, size=size)), 0.01))
        gates = attention.gates() if isinstance(attention, FastShuffleAttention) else ()
        order = shuffled if gates else as_it_is
        if norm.training:
            norm.get_buffer("num_batches_tracked").add_(1)
        averages = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        ordered = [order(average) for average in averages]
        how = norm.training, norm.momentum, norm.eps, attention.norm.eps if gates else 0.0
        y = conv3x3(x, self.conv.weight, size=size, order=order, keep=not self.training)
        y = NormGates.apply(y, order(norm.weight), order(norm.bias), *ordered, *how, *gates)
        if norm.training and gates:
            for average, new in zip(averages, ordered, strict=True):
                average.copy_(new.unflatten(0, (-1, 2)).t().flatten())
        return y


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
        if usable(x) and x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        h = _conv(self.conv1, self.fuse1(x, conditions[:2]), self.size)
        h = _conv(self.conv2, self.fuse2(h, conditions[2:]), None)
        shortcut = self.shortcut
        if isinstance(shortcut, nn.Conv2d) and usable(x) and x.device.type == "cpu":
            x = conv1x1(x, shortcut.weight, cast(Tensor, shortcut.bias))
        else:
            x = shortcut(x)
        return (x if x.shape[-1] == self.size else F.interpolate(x, size=(self.size, self.size))) + h


def _conv(conv: nn.Module, x: Tensor, size: int | None) -> Tensor:
    """conv3x3 or conv-shuffle of `x` resized by nearest to `size`; None: as it is."""
    if type(conv) is nn.Conv2d:
        return conv3x3(x, conv.weight, conv.bias, size, keep=not conv.training)
    return conv(x, size)


class FastToRGB(nn.Conv2d):
    """The last convolution as the transposed one with its kernel turned round, on a map with the channels last.

    The library's convolution to three channels is slow in the backward pass; as a transposed convolution from three
    it is the forward pass of what it is good at.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not usable(x):
            return super().forward(x)
        x, turned = x.contiguous(memory_format=torch.channels_last), self.weight.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, turned, self.bias, padding=1).contiguous()


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
    ResidualBlock: FastResidualBlock,
    Discriminator: FastDiscriminator,
}
