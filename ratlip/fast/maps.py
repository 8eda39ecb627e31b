"""Affines, batch norm and the gates of shuffle attention, and which convolution to take, in less time and memory.

Each function computes what PyTorch's own operations compute, up to rounding: they read a map fewer times, and keep
for the backward pass one map of several, from which the others are quickly made again. They are for full precision
and can be differentiated once. Under autocast, and while a graph is traced, callers use PyTorch's operations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ratlip.fast.products import Order, as_it_is, upsampled_conv3x3, winograd_conv3x3


def usable(x: Tensor) -> bool:
    """Whether the functions of this module may work on `x`: 32 or 64 bits, no autocast, not traced."""
    traced = torch.compiler.is_compiling()
    return not traced and x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    size: int | None = None,
    *,
    order: Order = as_it_is,
    keep: bool = False,
) -> Tensor:
    """conv3x3 with padding 1 of `x` (B,C_in,H,W), resized by nearest to `size` where one is given.

    `order`: of the weight's output channels; `keep`: see `products.kernels`.

    On a CPU by products where they pay (measured at the published size): from 16 pixels a side and 128 channels on.
    A GPU's library has fast algorithms of its own, against which they were not measured.
    """
    side, on_cpu = x.shape[-1], x.device.type == "cpu"
    if size is None or size == side:
        if usable(x) and on_cpu and min(weight.shape[:2]) >= 128 and side >= 16 and not (side | x.shape[-2]) & 1:
            y = winograd_conv3x3(x, weight, order, keep)
            return y if bias is None else y + bias[:, None, None]
        return F.conv2d(x, order(weight), bias, padding=1)
    if not usable(x):
        return F.conv2d(F.interpolate(x, size=(size, size)), order(weight), bias, padding=1)
    if not on_cpu or size * size < 2 * side * side:
        return _ResizedConv.apply(x, order(weight), bias, size)
    y = upsampled_conv3x3(x, weight, size, order, keep)
    return y if bias is None else y + bias[:, None, None]


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
        wanted, one = ctx.needs_input_grad[:3], [1, 1]
        of_large, *others = torch.ops.aten.convolution_backward(
            grad, large, weight, [len(weight)], one, one, one, False, [0, 0], 1, wanted
        )
        if of_large is not None:
            of_large = torch.ops.aten.upsample_nearest2d_backward(of_large, ctx.size, x.shape)
        return of_large, *others, None


def _sum(x: Tensor, like: Tensor) -> Tensor:
    """Sum over positions, and over the batch where `like` (B or 1,C,1,1) is one for all."""
    return x.sum(dim=(2, 3), keepdim=True).sum_to_size(like.shape)


class Affines(Function):
    """leaky(gamma1 * leaky(gamma0 * x + beta0) + beta1), leaky = LeakyReLU 0.2: a fuse; keeps its input and output.

    x (B,C,H,W); gammas and betas (B,C,1,1) or (1,C,1,1).
    """

    @staticmethod
    def forward(ctx, x: Tensor, gamma0: Tensor, beta0: Tensor, gamma1: Tensor, beta1: Tensor) -> Tensor:
        y = F.leaky_relu_(torch.addcmul(beta0, gamma0, x), 0.2)
        y = F.leaky_relu_(torch.addcmul(beta1, gamma1, y, out=y), 0.2)
        ctx.save_for_backward(x, y, gamma0, beta0, gamma1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, y, gamma0, beta0, gamma1 = ctx.saved_tensors
        outer = torch.ops.aten.leaky_relu_backward(grad, y, 0.2, True)
        between = F.leaky_relu_(torch.addcmul(beta0, gamma0, x), 0.2)
        d_beta1, d_gamma1 = _sum(outer, gamma1), _sum(outer * between, gamma1)
        inner = outer.mul_(gamma1)
        torch.ops.aten.leaky_relu_backward(inner, between, 0.2, True, grad_input=inner)
        d_beta0, d_gamma0 = _sum(inner, gamma0), _sum(torch.mul(inner, x, out=between), gamma0)
        return inner.mul_(gamma0), d_gamma0, d_beta0, d_gamma1, d_beta1


class NormGates(Function):
    """Batch norm, LeakyReLU 0.01 and, where `gates` are given, the gates of shuffle attention; keeps its input alone.

    x (B,C,H,W); weight, bias, running mean and variance (C). An activation u is multiplied by sigmoid(scale * u +
    shift), with scale = of_norm / std and shift = constant + of_mean * mean - scale * mean: mean and std of u over
    positions, three `gates` of_mean, of_norm, constant (C). A channel gate has of_norm 0, a spatial one of_mean 0.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, training, momentum, eps, gate_eps, *gates) -> Tensor:
        # Not by PyTorch's batch norm: with the channels last it adds up one number after the other, which at 200,000
        # positions costs gradients three digits.
        mean, variance = running_mean, running_var
        if training:
            mean = x.mean(dim=(0, 2, 3))
            variance = (x - _spread(mean)).square_().mean(dim=(0, 2, 3))
            count = x.numel() // len(mean)
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * (count / max(1, count - 1)), momentum)
        rstd = torch.rsqrt(variance + eps)
        slope = weight * rstd
        y = F.leaky_relu_(torch.addcmul(_spread(bias - slope * mean), _spread(slope), x), 0.01)
        moments: tuple[Tensor, ...] = ()
        if gates:
            average = y.mean(dim=(2, 3))
            centred = y - _spread(average)  # squares of what is not centred cancel where a map is almost constant
            moments = average, torch.rsqrt(centred.square_().mean(dim=(2, 3)) + gate_eps)
            shift, scale = _shift_and_scale(moments, gates)
            y.mul_(torch.addcmul(shift, scale, y, out=centred).sigmoid_())
        ctx.save_for_backward(x, weight, bias, mean, rstd, *moments, *gates)
        ctx.training = training
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, bias, mean, rstd, *rest = ctx.saved_tensors
        slope = weight * rstd
        y = F.leaky_relu_(torch.addcmul(_spread(bias - slope * mean), _spread(slope), x), 0.01)
        of_gates: tuple[Tensor, ...] = ()
        if rest:
            grad, of_gates = _through_gates(grad, y, rest[:2], rest[2:])
        grad = torch.ops.aten.leaky_relu_backward(grad, y, 0.01, True, grad_input=y)  # in the place of y
        centred = x - _spread(mean)
        of_bias, of_weight = grad.sum(dim=(0, 2, 3)), (grad * centred).sum(dim=(0, 2, 3)) * rstd
        if ctx.training:
            share = slope / (x.numel() // len(mean))
            of_x = torch.addcmul(_spread(-share * of_bias), _spread(slope), grad, out=grad)
            of_x.addcmul_(centred, _spread(-share * rstd * of_weight))
        else:
            of_x = grad.mul_(_spread(slope))
        return of_x, of_weight, of_bias, *[None] * 6, *of_gates


def _spread(x: Tensor) -> Tensor:
    return x[..., None, None]


def _shift_and_scale(moments, gates) -> tuple[Tensor, Tensor]:
    """(B,C,1,1) each, of moments (B,C) and gates (C)."""
    (mean, rstd), (of_mean, of_norm, constant) = moments, gates
    scale = of_norm * rstd
    return _spread(constant + (of_mean - scale) * mean), _spread(scale)


def _through_gates(grad: Tensor, u: Tensor, moments, gates) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of u * sigmoid(scale * u + shift) for u, through the moments too, and for the three gates."""
    (mean, rstd), (of_mean, of_norm, _) = moments, gates
    shift, scale = _shift_and_scale(moments, gates)
    opened = torch.addcmul(shift, scale, u).sigmoid_()
    slope = grad * u
    torch.ops.aten.sigmoid_backward(slope, opened, grad_input=slope)  # of the sigmoid's argument
    of_u = opened.mul_(grad).addcmul_(slope, scale)
    of_shift = slope.sum(dim=(2, 3))
    centred = u - _spread(mean)  # the shift holds the scale too
    of_scale = slope.mul_(centred).sum(dim=(2, 3))
    of_rstd = of_scale * of_norm
    pull = of_rstd * rstd.pow(3) / -(u.shape[2] * u.shape[3])  # of the variance, on each position
    of_positions = of_shift * (of_mean - of_norm * rstd) / (u.shape[2] * u.shape[3])
    of_u += torch.addcmul(_spread(of_positions), _spread(pull), centred, out=slope)
    return of_u, ((of_shift * mean).sum(0), (of_scale * rstd).sum(0), of_shift.sum(0))


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
