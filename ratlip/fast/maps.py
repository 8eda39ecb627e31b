"""Convolution after resizing and the gates of shuffle attention, with less work and less memory.

Each function computes what PyTorch's own operations compute, up to rounding: they read a map fewer times, and keep
for the backward pass what is small instead of what is quickly made again. They are for training in full precision and
can be differentiated once. Under autocast, and while a graph is traced, callers use PyTorch's operations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # row and column of an output pixel within its source pixel


def usable(x: Tensor) -> bool:
    """Whether the functions of this module may work on `x`: 32 or 64 bits, no autocast, not traced."""
    traced = torch.compiler.is_compiling()
    return not traced and x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)


def resized_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """conv3x3 with padding 1 of `x` (B,C_in,s,s) resized by nearest to `size` -> (B,C_out,size,size)."""
    if x.shape[-1] == size:
        return F.conv2d(x, weight, bias, padding=1)
    if not usable(x):
        return F.conv2d(F.interpolate(x, size=(size, size)), weight, bias, padding=1)
    # A GPU's library has fast algorithms of its own for 3x3, against which the phases were not measured.
    if 2 * x.shape[-1] == size and x.device.type == "cpu":
        y = _Phases.apply(x, phase_kernels(weight))
        return y if bias is None else y.add_(bias[:, None, None])
    return _ResizedConv.apply(x, weight, bias, size)


def phase_kernels(weight: Tensor) -> Tensor:
    """3x3 kernels (C_out,C_in,3,3) -> the 2x2 kernels (4*C_out,C_in,2,2) that see the map before it is doubled.

    In a map doubled by nearest, the three rows that an even row's kernel sees are two rows of the source: the one
    above once and its own twice; an odd row's are its own twice and the one below once. So two of the three
    weights always meet the same number and can be added up beforehand: 4 products instead of 9.
    """
    return torch.cat([kernels for rows in _folded(weight, 2) for kernels in _folded(rows, 3)])


def _folded(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three weights along `dim` as the two that an even and an odd position's kernel need."""
    even = torch.cat((weight.narrow(dim, 0, 1), weight.narrow(dim, 1, 2).sum(dim, keepdim=True)), dim)
    return even, torch.cat((weight.narrow(dim, 0, 2).sum(dim, keepdim=True), weight.narrow(dim, 2, 1)), dim)


class _Phases(Function):
    """The four 2x2 convolutions of `phase_kernels` on the small map, woven into the large one."""

    @staticmethod
    def forward(ctx, x: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernels)
        side = x.shape[-1]
        parts = F.conv2d(x, kernels, padding=1).chunk(4, dim=1)  # side + 1 positions: each phase uses its `side`
        y = x.new_empty(len(x), len(kernels) // 4, 2 * side, 2 * side)
        for (i, j), part in zip(PHASES, parts, strict=True):
            _woven(y, side)[:, :, :, i, :, j] = part[:, :, i : i + side, j : j + side]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, kernels = ctx.saved_tensors
        side = x.shape[-1]
        parts = grad.new_zeros(len(x), len(kernels), side + 1, side + 1)
        for (i, j), part in zip(PHASES, parts.chunk(4, dim=1), strict=True):
            part[:, :, i : i + side, j : j + side] = _woven(grad, side)[:, :, :, i, :, j]
        return _conv_backward(parts, x, kernels, ctx.needs_input_grad)[:2]


def _woven(y: Tensor, side: int) -> Tensor:
    """View of y (B,C,2*side,2*side) as (B,C,side,2,side,2): source row, phase, source column, phase."""
    return y.unflatten(3, (side, 2)).unflatten(2, (side, 2))


class _ResizedConv(Function):
    """Resizing by nearest and conv3x3; the resized map is made again for the backward pass, not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.size = size, size
        return F.conv2d(F.interpolate(x, size=ctx.size), weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        large = F.interpolate(x, size=ctx.size)
        of_large, *others = _conv_backward(grad, large, weight, ctx.needs_input_grad[:3])
        if of_large is not None:
            of_large = torch.ops.aten.upsample_nearest2d_backward(of_large, ctx.size, x.shape)
        return of_large, *others, None


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted) -> tuple[Tensor | None, ...]:
    """Gradients of a convolution with stride 1 and padding 1 for its input, weight and bias, as far as wanted."""
    wanted, one = [*wanted, False][:3], [1, 1]
    return torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], one, one, one, False, [0, 0], 1, wanted)


class Moments(Function):
    """x (B,G,C,H,W) -> variance (biased) and mean over positions, (B,G,C,1,1) each."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, dim=(3, 4), correction=0, keepdim=True)
        ctx.save_for_backward(x, mean)
        return variance, mean

    @staticmethod
    @once_differentiable
    def backward(ctx, of_variance: Tensor, of_mean: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        positions = x.shape[3] * x.shape[4]
        slope = of_variance * (2 / positions)
        return torch.addcmul(of_mean / positions - slope * mean, slope, x)


class ShuffledGates(Function):
    """Both gates of shuffle attention and the shuffling of channels, in one go.

    x (B,G,2,C,H,W), G even; gate, scale, shift (B,G,C,1,1). The first halves x[:, :, 0] are multiplied by `gate`,
    the second ones by sigmoid(scale * x + shift). Returns (B,2*G*C,H,W), channels shuffled in two groups.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, scale, shift)
        channel, spatial = x.unbind(2)
        y = x.new_empty(x.shape[0], x[0, :, :, :, 0, 0].numel(), *x.shape[4:])
        to_channel, to_spatial = _shuffled(y, x).unbind(3)
        torch.mul(_halves(channel), _halves(gate), out=to_channel)
        torch.mul(_halves(spatial), _halves(torch.addcmul(shift, scale, spatial).sigmoid_()), out=to_spatial)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, gate, scale, shift = ctx.saved_tensors
        channel, spatial = x.unbind(2)
        of_channel, of_spatial = (part.reshape(spatial.shape) for part in _shuffled(grad.contiguous(), x).unbind(3))
        dx = torch.empty_like(x)
        torch.mul(of_channel, gate, out=dx[:, :, 0])
        d_gate = _sum(of_channel * channel)  # not in place: the parts may be views of `grad`
        opened = torch.addcmul(shift, scale, spatial).sigmoid_()
        through = of_spatial * opened
        slope = opened.neg_().add_(1).mul_(through).mul_(spatial)  # of the sigmoid's argument
        torch.addcmul(through, slope, scale, out=dx[:, :, 1])
        d_shift = _sum(slope)
        return dx, d_gate, _sum(slope.mul_(spatial)), d_shift


def _sum(x: Tensor) -> Tensor:
    return x.sum(dim=(3, 4), keepdim=True)


def _halves(x: Tensor) -> Tensor:
    """(B,G,...) -> (B,2,G/2,...)."""
    return x.unflatten(1, (2, -1))


def _shuffled(y: Tensor, x: Tensor) -> Tensor:
    """View of y (B,2*G*C,H,W), channels shuffled in two groups, as (B,2,G/2,2,C,H,W): unshuffled."""
    _, groups, two, channels = x.shape[:4]
    return y.unflatten(1, (groups // 2, two, channels, 2)).movedim(4, 1)


def checkpointed(block: nn.Module, *arguments, forward: Callable | None = None):
    """`block(*arguments)`, or its `forward`; what lies within is made again for the backward pass, not kept."""

    def contexts():
        return nullcontext(), _norms_at_rest(block)

    work = forward or block
    return checkpoint(work, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _norms_at_rest(module: nn.Module) -> Iterator[None]:
    """Batch norm's running averages do not move: a forward pass that is repeated is not a new one."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.get_buffer("num_batches_tracked").clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.get_buffer("num_batches_tracked").copy_(count)
