"""Shuffle attention (SA-Net; paper, Method 2) and the convolution that carries it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratlip.fast.maps import Moments, ShuffledGates, resized_conv3x3, usable


class ShuffleAttention(nn.Module):
    """Shuffle attention: channels are cut into `groups`, each group into two halves (official.md, Generator).

    first half:   x * sigmoid(weight * mean over positions + bias)     "which channel"
    second half:  x * sigmoid(weight * GroupNorm(x) + bias)            "which place"

    The halves are joined again and the channels shuffled in two groups, so that the next block's groups
    mix them. The parameters belong to the channels of half a group, C / (2 * groups), and are shared by the
    groups. Weights start at 0 and biases at 1: at first the module only scales by sigmoid(1) = 0.731.
    """

    def __init__(self, channels: int, groups: int = 8):
        super().__init__()
        if channels % (2 * groups):
            raise ValueError(
                f"shuffle attention cuts each of {groups} groups in two halves, which {channels} channels do "
                f"not allow: choose attention_groups so that {channels} is a multiple of 2 * attention_groups"
            )
        self.groups = groups
        half = channels // (2 * groups)
        self.channel_weight = nn.Parameter(torch.zeros(1, half, 1, 1))
        self.channel_bias = nn.Parameter(torch.ones(1, half, 1, 1))
        self.place_weight = nn.Parameter(torch.zeros(1, half, 1, 1))
        self.place_bias = nn.Parameter(torch.ones(1, half, 1, 1))
        self.norm = nn.GroupNorm(half, half)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> (B,C,H,W), channels shuffled."""
        if usable(x) and self.groups % 2 == 0:
            return self._lean(x)
        channel, place = x.unflatten(1, (self.groups, -1)).flatten(0, 1).chunk(2, dim=1)
        mean = channel.mean(dim=(2, 3), keepdim=True)
        channel = channel * torch.sigmoid(self.channel_weight * mean + self.channel_bias)
        place = place * torch.sigmoid(self.place_weight * self.norm(place) + self.place_bias)
        joined = torch.cat((channel, place), dim=1).view_as(x)
        return F.channel_shuffle(joined, 2)

    def _lean(self, x: Tensor) -> Tensor:
        """The same numbers, with fewer passes over the maps: GroupNorm of one channel a group only shifts and
        scales, and so does what follows it, up to the sigmoid.
        """
        parts = x.unflatten(1, (self.groups, 2, -1))
        channel, place = parts.unbind(2)
        gate = torch.sigmoid(self.channel_weight * channel.mean(dim=(3, 4), keepdim=True) + self.channel_bias)
        variance, mean = Moments.apply(place)
        norm = self.norm
        weight = self.place_weight * norm.weight[:, None, None]
        scale = weight * torch.rsqrt(variance + norm.eps)
        shift = self.place_weight * norm.bias[:, None, None] + self.place_bias - scale * mean
        return ShuffledGates.apply(parts, gate, scale, shift)


class Conv3x3(nn.Conv2d):
    """conv3x3 with padding 1, which can resize its input by nearest first."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """x (B,C_in,H,W) -> (B,C_out,H,W), or (B,C_out,size,size)."""
        return super().forward(x) if size is None else resized_conv3x3(x, self.weight, self.bias, size)


class ConvShuffle(nn.Module):
    """conv3x3 without bias, BatchNorm, LeakyReLU 0.01, shuffle attention (official.md, "conv-shuffle").

    groups=0 leaves the attention out and keeps the rest: the "norm" variant of the attention ablation.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 8):
        super().__init__()
        self.conv = Conv3x3(in_channels, out_channels, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.attention = ShuffleAttention(out_channels, groups) if groups else nn.Identity()

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """x (B,C_in,H,W) -> (B,C_out,H,W), or (B,C_out,size,size): of x resized by nearest first."""
        return self.attention(F.leaky_relu(self.norm(self.conv(x, size)), 0.01, inplace=True))
