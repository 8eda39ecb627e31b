"""Shuffle attention (SA-Net; paper, Method 2) and the convolution that carries it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ShuffleAttention(nn.Module):
    """Shuffle attention: channels are cut into `groups`, each group into two halves (official.md, Generator).

    first half:   x * sigmoid(weight * mean over positions + bias)     "which channel"
    second half:  x * sigmoid(weight * GroupNorm(x) + bias)            "which position"

    The halves are joined again and the channels shuffled in two groups, so that the next block's groups
    mix them. The parameters belong to the channels of half a group, C / (2 * groups), and are shared by the
    groups. Weights start at 0 and biases at 1: at first the module only scales by sigmoid(1) = 0.731.
    """

    def __init__(self, channels: int, groups: int = 8):
        super().__init__()
        if channels % (2 * groups):
            mend = f"choose attention_groups so that {channels} is a multiple of 2 * attention_groups"
            raise ValueError(
                f"shuffle attention halves {groups} groups, which {channels} channels do not allow: {mend}"
            )
        self.groups = groups
        half = channels // (2 * groups)
        self.channel_weight = nn.Parameter(torch.zeros(1, half, 1, 1))
        self.channel_bias = nn.Parameter(torch.ones(1, half, 1, 1))
        self.spatial_weight = nn.Parameter(torch.zeros(1, half, 1, 1))
        self.spatial_bias = nn.Parameter(torch.ones(1, half, 1, 1))
        self.norm = nn.GroupNorm(half, half)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> (B,C,H,W), channels shuffled."""
        channel, spatial = x.unflatten(1, (self.groups, -1)).flatten(0, 1).chunk(2, dim=1)
        mean = channel.mean(dim=(2, 3), keepdim=True)
        channel = channel * torch.sigmoid(self.channel_weight * mean + self.channel_bias)
        spatial = spatial * torch.sigmoid(self.spatial_weight * self.norm(spatial) + self.spatial_bias)
        return F.channel_shuffle(torch.cat((channel, spatial), dim=1).view_as(x), 2)


class ConvShuffle(nn.Module):
    """conv3x3 without bias, BatchNorm, LeakyReLU 0.01, shuffle attention (official.md, "conv-shuffle").

    groups=0 leaves the attention out and keeps the rest: the "norm" variant of the attention ablation.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.attention = ShuffleAttention(out_channels, groups) if groups else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C_in,H,W) -> (B,C_out,H,W)."""
        return self.attention(F.leaky_relu(self.norm(self.conv(x)), 0.01))
