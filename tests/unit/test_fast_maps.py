"""Convolutions by fewer products, affines and gates in fewer passes: equal to PyTorch's own, gradients included.

In double precision and to 1e-10 there is no other explanation than the same function.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ratlip.fast import accelerate, products
from ratlip.fast.maps import conv3x3
from ratlip.fast.products import conv1x1, upsampled_conv3x3, winograd_conv3x3
from ratlip.networks import ConvShuffle, ShuffleAttention
from ratlip.networks.affine import affine_factories
from ratlip.networks.generator import Fuse, SynthesisBlock


def map64(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def moved(network):
    """In double precision and off the start, where affines are the identity and gates are constant."""
    network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def assert_same(mine, theirs, wanted):
    """Values, and gradients for `wanted` from a random upstream."""
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    upstream = torch.randn_like(theirs)
    grads = (torch.autograd.grad(y, wanted, upstream) for y in (mine, theirs))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


SIZES = [(1, 2), (3, 6), (8, 16), (4, 7), (7, 8), (5, 5), (8, 14), (6, 9), (2, 9)]


@pytest.mark.parametrize("side, size", SIZES)
@pytest.mark.parametrize("chunk", [1, products.CHUNK])
def test_convolution_of_an_upsampled_map(side, size, chunk, monkeypatch):
    monkeypatch.setattr(products, "CHUNK", chunk)
    x, weight = map64(2, 3, side, side), map64(4, 3, 3, 3)
    theirs = F.conv2d(F.interpolate(x, size=(size, size)), weight, padding=1)
    assert_same(upsampled_conv3x3(x, weight, size), theirs, (x, weight))


@pytest.mark.parametrize("height, width", [(2, 2), (4, 6), (8, 8)])
@pytest.mark.parametrize("chunk", [1, products.CHUNK])
def test_winograd(height, width, chunk, monkeypatch):
    monkeypatch.setattr(products, "CHUNK", chunk)
    x, weight = map64(3, 3, height, width), map64(4, 3, 3, 3)
    assert_same(winograd_conv3x3(x, weight), F.conv2d(x, weight, padding=1), (x, weight))


@pytest.mark.parametrize("size", [None, 32])
def test_kernels_that_are_kept_follow_their_weight(size, monkeypatch):
    made, combined = [], products._combined
    monkeypatch.setattr(products, "_combined", lambda *given: made.append(1) or combined(*given))
    conv, x = nn.Conv2d(128, 128, 3, padding=1, bias=False).double(), map64(1, 128, 16, 16).detach()
    large = x if size is None else F.interpolate(x, size=(size, size))

    def check(times):
        with torch.no_grad():
            found = [conv3x3(x, conv.weight, size=size, order=turned, keep=True) for _ in range(2)]
            for each in found:
                torch.testing.assert_close(each, F.conv2d(large, turned(conv.weight), padding=1), rtol=0, atol=1e-10)
        assert len(made) == times

    def turned(weight):
        return weight.flip(0)

    check(1)
    with torch.no_grad():
        conv.weight.mul_(2)
    check(2)
    conv.weight.data = conv.weight.data + 1
    check(3)
    conv.load_state_dict({"weight": torch.randn_like(conv.weight)})
    check(4)
    conv3x3(x, conv.weight, size=size, order=turned, keep=True)  # a gradient may be asked for
    with torch.no_grad():
        conv3x3(x, conv.weight, size=size, order=turned)
    assert len(made) == 6
    check(6)


def test_convolution_of_single_positions():
    x, weight, bias = map64(2, 5, 3, 4), map64(3, 5, 1, 1), map64(3)
    assert_same(conv1x1(x, weight, bias), F.conv2d(x, weight, bias), (x, weight, bias))


def test_winograd_rounds_little_more_than_a_direct_convolution():
    x, weight = torch.randn(1, 256, 16, 16), torch.randn(256, 256, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    mine, direct = ((y - exact).abs().mean() for y in (winograd_conv3x3(x, weight), F.conv2d(x, weight, padding=1)))
    assert mine < 8 * direct


CHOSEN = [*((4, *sizes) for sizes in SIZES), (4, 16, None), (128, 16, None), (128, 17, None), (128, 8, None)]


@pytest.mark.parametrize("channels, side, size", CHOSEN)
@pytest.mark.parametrize("bias", [False, True])
def test_the_convolution_that_is_chosen(channels, side, size, bias):
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias).double()
    x = map64(1, channels, side, side)
    theirs = conv(x if size is None else F.interpolate(x, size=(size, size)))
    assert_same(conv3x3(x, conv.weight, conv.bias, size), theirs, (x, *conv.parameters()))


@pytest.mark.parametrize("conditioning", ["cat", "rat", "rat-official"])
def test_a_fuse_in_one_function(conditioning):
    plain = moved(Fuse(6, affine_factories(5, 5)[conditioning]))
    fast = copy.deepcopy(plain)
    accelerate(fast)
    x, conditions = map64(3, 6, 4, 5), [map64(3, 5) for _ in range(2)]
    found = []
    for fuse in (fast, plain):
        y = fuse(x, conditions)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append([y, *torch.autograd.grad(y, (x, *conditions, *fuse.parameters()), upstream)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_fuse_of_affines_that_nobody_made_fast():
    class Shift(nn.Module):
        def forward(self, x, condition):
            return x + condition[:, :1, None, None]

    fuse = Fuse(2, lambda channels: Shift())
    x, conditions = torch.randn(3, 2, 4, 4), [torch.randn(3, 5) for _ in range(2)]
    plain = fuse(x, conditions)
    accelerate(fuse)
    assert torch.equal(fuse(x, conditions), plain)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [None, 8, 7])
@pytest.mark.parametrize("channels, groups", [(48, 1), (48, 2), (48, 3), (48, 8), (6, 0)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv_shuffle(groups, channels, size, training, layout):
    """Value, gradients and running averages after two batches; the channels' order included."""
    plain = moved(ConvShuffle(channels, channels, groups)).train(training)
    with torch.no_grad():
        plain.norm.running_mean.normal_()
        plain.norm.running_var.uniform_(0.5, 2)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    found = []
    for conv in (fast, plain):
        torch.manual_seed(1)
        for _ in range(2):
            x = (1 + torch.randn(2, channels, 4, 4).double()).to(memory_format=layout).requires_grad_()
            if conv is fast:
                y = conv(x, size)
            else:
                y = conv(x if size is None else F.interpolate(x, size=(size, size)))
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        found.append([y, *torch.autograd.grad(y, (x, *conv.parameters()), upstream), *conv.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_gates_of_an_almost_constant_map():
    """In single precision, and with the channels last: the squares of a mean 1000 times the deviation hide it."""
    attention = ConvShuffle(16, 16, 2)
    moved(attention).float().eval()
    with torch.no_grad():
        attention.conv.weight.zero_()[:, :, 1, 1] = torch.eye(16)
    x = 10 + 0.01 * torch.randn(2, 16, 32, 32)
    exact = copy.deepcopy(attention).double()(x.double())
    accelerate(attention)
    mine = attention(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)


def test_shuffle_attention_alone_is_the_plain_one():
    attention = moved(ShuffleAttention(16, 2))
    x = torch.randn(2, 16, 3, 3).double()
    plain = attention(x)
    accelerate(attention)
    assert torch.equal(attention(x), plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_wide_block_takes_every_shortcut(checkpointing):
    """128 channels, 8 to 16 pixels: upsampled and Winograd's convolution in one, and made again for checkpointing."""
    affine = affine_factories(5, 5)["cat"]
    plain = moved(SynthesisBlock(128, 128, 16, affine, lambda before, after: ConvShuffle(before, after, 8)))
    fast = copy.deepcopy(plain)
    accelerate(fast)
    fast.checkpointing = checkpointing
    x, conditions = map64(2, 128, 8, 8), [torch.randn(2, 5).double() for _ in range(4)]
    found = []
    for block in (fast, plain):
        y = block(x, conditions)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        found.append([y, *torch.autograd.grad(y, (x, *block.parameters()), upstream), *block.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_weights_may_change_between_calls():
    """Nothing made of the weights outlives a call."""
    conv = ConvShuffle(128, 128, 8).eval()
    accelerate(conv)
    x = torch.randn(1, 128, 16, 16)
    with torch.no_grad():
        before = conv(x)
        conv.conv.weight.mul_(2)
        conv.norm.bias.add_(1)
        after = conv(x)
        accelerate(conv, on=False)
        torch.testing.assert_close(after, conv(x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before, after, atol=0.1)
