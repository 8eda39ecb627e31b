"""Convolutions with fewer multiplications, as matrix products of sums and differences of positions.

A convolution by a library that runs at the processor's matrix rate can only become faster by multiplying less.
`upsampled_conv3x3`: a map resized by nearest repeats itself, and what repeats is multiplied once. `winograd_conv3x3`:
Winograd's F(2x2, 3x3) (Lavin and Gray 2016, arXiv:1509.09308), 16 products for 4 positions instead of 36. Both add
up the same terms in another order, with coefficients 1 and 1/2 alone: what they round is of the size of what a direct
convolution rounds. Maps lie in memory with the channels last, where sums of positions are sums of whole vectors.
Both can be differentiated once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ratlip.fast.tower import onednn_is_faster

# What products are made with, from three weights along one axis; combined for two axes, the row's combination first.
SUM_FIRST_LAST = ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, -1.0))
TILES = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
WINOGRAD = torch.kron(torch.tensor(TILES), torch.tensor(TILES))
UPSAMPLED = torch.kron(*[torch.tensor(SUM_FIRST_LAST)] * 2)[[0, 1, 2, 3, 6, 4, 5, 7, 8]]  # sums; one sum; no sum

Tensors = Sequence[Tensor] | Tensor
Order = Callable[[Tensor], Tensor]  # of a weight's output channels
_KEPT: Any = WeakTensorKeyDictionary()  # weight -> (what it was, its kernels)
CHUNK = 2**23  # numbers that a transformed part of a map has at most: 32 MiB


def as_it_is(x: Tensor) -> Tensor:
    """No other order."""
    return x


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (...,K) times the rows of weight (N,K) -> (...,N), without autograd."""
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu" and x.dtype == torch.float32 and onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "").unflatten(0, x.shape[:-1])
    return F.linear(rows, weight).unflatten(0, x.shape[:-1])


def _of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `product` for its weight: grad (...,N), x (...,K) -> (N,K)."""
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _combined(weight: Tensor, combinations: Tensor) -> Tensor:
    """Weights (C_out,C_in,3,3) -> (N,C_out,C_in), by N combinations (N,9) of the nine."""
    nine = weight.flatten(2).flatten(0, 1).t().contiguous()
    return (combinations.to(weight) @ nine).unflatten(1, weight.shape[:2])


def _last(x: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,H,W,C), contiguous: a view where the channels lie last already."""
    return x.permute(0, 2, 3, 1).contiguous()


def kernels(weight: Tensor, combinations: Tensor, order: Order, keep: bool) -> Tensor:
    """`_combined` of the weights (C_out,C_in,3,3) in another order.

    With `keep` and without gradients they are made once for as long as the weights stay as they are: at batch 1 making
    them is 45 ms on one thread of a generation at the published size. They hold as much memory as the weights or more.
    """
    if not keep or torch.is_grad_enabled() or weight.is_inference() or torch.compiler.is_compiling():
        return _combined(order(weight), combinations)
    state = weight._version, weight.data_ptr(), id(combinations), order
    if (kept := _KEPT.get(weight)) is None or kept[0] != state:
        kept = _KEPT[weight] = state, _combined(order(weight), combinations)
    return kept[1]


def upsampled_conv3x3(x: Tensor, weight: Tensor, size: int, order: Order = as_it_is, keep: bool = False) -> Tensor:
    """conv3x3 with padding 1 of `x` (B,C_in,s,s) resized by nearest to `size` >= s -> (B,C_out,size,size).

    Along one axis, with weights w0, w1, w2, an output whose own pixel comes from source pixel j sees x_j three times
    but for its neighbours from elsewhere: (w0 + w1 + w2) x_j + w0 d_j [it is the first of j's] - w2 d_{j+1} [the last
    of them], where d_j = x_{j-1} - x_j. So there are three products for each source pixel, nine in the plane: as many
    as on the small map, however large the other is.
    """
    return _Upsampled.apply(x, kernels(weight, UPSAMPLED, order, keep).flatten(0, 1), size)


@cache
def _sources(small: int, large: int) -> tuple[int, list[int]]:
    """(periods, source of each position of one period) of resizing `small` positions by nearest to `large`."""
    whole = F.interpolate(torch.arange(small, dtype=torch.float64)[None, None], size=large)[0, 0].int().tolist()
    periods = gcd(small, large)
    one = whole[: large // periods]
    shifted = [source + period * (small // periods) for period in range(periods) for source in one]
    return (periods, one) if shifted == whole else (1, whole)


def _turns(small: int, large: int) -> tuple[int, list[tuple[int, bool, bool]]]:
    """`_sources` with, for each position, whether it is the first and whether the last from its source."""
    periods, one = _sources(small, large)
    changes = [True, *(a != b for a, b in pairwise(one)), True]
    return periods, [(source, changes[i], changes[i + 1]) for i, source in enumerate(one)]


def _woven(parts: Tensors, y: Tensor, dim: int) -> Tensor:
    """Products of sums, of first and of last differences along `dim` -> the outputs `y`."""
    periods, turns = _turns(parts[0].shape[dim], y.shape[dim])
    of_y, (sums, first, last) = (y.unflatten(dim, (periods, -1)), (p.unflatten(dim, (periods, -1)) for p in parts))
    for position, (source, is_first, is_last) in enumerate(turns):
        out, term = of_y.select(dim + 1, position), sums.select(dim + 1, source)
        if is_first:
            term = torch.add(term, first.select(dim + 1, source), out=out)
        if is_last:
            term = torch.add(term, last.select(dim + 1, source), out=out)
        if term is not out:
            out.copy_(term)
    return y


def _unwoven(y: Tensor, parts: Tensors, dim: int) -> None:
    """The transpose of `_woven`, written into `parts`."""
    periods, turns = _turns(parts[0].shape[dim], y.shape[dim])
    of_y, (sums, first, last) = (y.unflatten(dim, (periods, -1)), (p.unflatten(dim, (periods, -1)) for p in parts))
    for position, (source, is_first, is_last) in enumerate(turns):
        term, total = of_y.select(dim + 1, position), sums.select(dim + 1, source)
        if is_first:
            total.copy_(term)
            first.select(dim + 1, source).copy_(term)
        else:
            total.add_(term)
        if is_last:
            last.select(dim + 1, source).copy_(term)


def _differences(x: Tensor, dim: int) -> Tensor:
    """d_j = x_{j-1} - x_j along `dim`, zero outside: s positions -> s + 1."""
    shape, last = list(x.shape), x.shape[dim] - 1
    shape[dim] += 1
    d = x.new_empty(shape)
    torch.neg(x.narrow(dim, 0, 1), out=d.narrow(dim, 0, 1))
    torch.sub(x.narrow(dim, 0, last), x.narrow(dim, 1, last), out=d.narrow(dim, 1, last))
    d.narrow(dim, last + 1, 1).copy_(x.narrow(dim, last, 1))
    return d


def _undone(d: Tensor, dim: int, onto: Tensor) -> Tensor:
    """The transpose of `_differences`, added to `onto`."""
    count = d.shape[dim] - 1
    return onto.add_(d.narrow(dim, 1, count)).sub_(d.narrow(dim, 0, count))


def _thirds(ss: Tensor, sd: Tensor, ds: Tensor, dd: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The nine products within their four arrays, by row (sums, first, last), each with its three columns."""
    rows, columns = ss.shape[1:3]
    sd_, ds_, dd_ = sd.chunk(2, -1), ds.chunk(2, -1), dd.chunk(4, -1)
    top, bottom = (0, rows), (1, rows)
    thirds = [(ss, sd_[0].narrow(2, 0, columns), sd_[1].narrow(2, 1, columns))]
    for i, span in enumerate((top, bottom)):
        own, one, other = (part.narrow(1, *span) for part in (ds_[i], dd_[2 * i], dd_[2 * i + 1]))
        thirds.append((own, one.narrow(2, 0, columns), other.narrow(2, 1, columns)))
    return thirds


class _Upsampled(Function):
    """kernels (9*C_out,C_in): one for the map, two for its differences along each axis, four for those along both."""

    @staticmethod
    def forward(ctx, x: Tensor, kernels: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x, kernels)
        ctx.size, width = size, len(kernels) // 9
        x, weights = _last(x), _Upsampled.split(kernels)
        y = x.new_empty(len(x), size, size, width)
        for source, target in _chunks(len(kernels) * x[0, :, :, 0].numel(), x, y):
            products = [product(each, w) for each, w in zip(_Upsampled.arrays(source), weights, strict=True)]
            rows = x.new_empty(3, len(source), source.shape[1], size, width)
            for row, third in zip(rows, _thirds(*products), strict=True):
                _woven(third, row, dim=2)
            del products
            _woven(rows, target, dim=1)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def split(kernels: Tensor) -> tuple[Tensor, ...]:
        return kernels.split([len(kernels) // 9 * n for n in (1, 2, 2, 4)])

    @staticmethod
    def arrays(x: Tensor) -> list[Tensor]:
        """The map, its differences along columns, along rows, and along both."""
        across = _differences(x, 2)
        return [x, across, _differences(x, 1), _differences(across, 1)]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved, kernels = ctx.saved_tensors
        x, grad, weights = _last(saved), _last(grad), _Upsampled.split(kernels)
        of_x, of_kernels = torch.empty_like(x), torch.zeros_like(kernels)
        side, width = x.shape[1], len(kernels) // 9
        shapes = ((side, side, 1), (side, side + 1, 2), (side + 1, side, 2), (side + 1, side + 1, 4))
        for source, upstream, target in _chunks(len(kernels) * side * side, x, grad, of_x):
            products = [x.new_zeros(len(source), high, wide, n * width) for high, wide, n in shapes]
            rows = x.new_empty(3, len(source), side, ctx.size, width)
            _unwoven(upstream, rows, dim=1)
            for row, third in zip(rows, _thirds(*products), strict=True):
                _unwoven(row, third, dim=2)
            del rows
            if ctx.needs_input_grad[1]:
                arrays = zip(products, _Upsampled.arrays(source), _Upsampled.split(of_kernels), strict=True)
                for upstream, array, of_kernel in arrays:
                    of_kernel += _of_weight(upstream, array)
            if ctx.needs_input_grad[0]:
                own, across, down, both = (product(p, w.t()) for p, w in zip(products, weights, strict=True))
                target.copy_(_undone(_undone(both, 1, across), 2, _undone(down, 1, own)))
        return *_wanted(ctx, of_x.permute(0, 3, 1, 2), of_kernels), None


def _chunks(numbers: int, *maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few images of each of `maps` at a time: as many as are transformed to CHUNK, at `numbers` an image."""
    return zip(*(each.split(max(1, CHUNK // numbers)) for each in maps), strict=True)


def _wanted(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False))


def winograd_conv3x3(x: Tensor, weight: Tensor, order: Order = as_it_is, keep: bool = False) -> Tensor:
    """conv3x3 with padding 1; x (B,C_in,H,W), H and W even, weight (C_out,C_in,3,3) -> (B,C_out,H,W)."""
    return _Winograd.apply(x, kernels(weight, WINOGRAD, order, keep))


def _tiles(x: Tensor, dim: int) -> Tensor:
    """x with 2t positions along `dim` -> (4,...) with t: d0 - d2, d1 + d2, d2 - d1, d1 - d3 of the tile's inputs.

    d0 .. d3 are the positions 2t - 1 .. 2t + 2, zero outside.
    """
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    count = even.shape[dim] - 1
    v = x.new_empty(4, *even.shape)
    torch.neg(odd.narrow(dim, 0, 1), out=v[0].narrow(dim, 0, 1))
    torch.sub(odd.narrow(dim, 0, count), odd.narrow(dim, 1, count), out=v[0].narrow(dim, 1, count))
    torch.add(even, odd, out=v[1])
    torch.sub(odd, even, out=v[2])
    torch.sub(even.narrow(dim, 0, count), even.narrow(dim, 1, count), out=v[3].narrow(dim, 0, count))
    v[3].narrow(dim, count, 1).copy_(even.narrow(dim, count, 1))
    return v


def _untiled(v: Tensors, dim: int) -> Tensor:
    """The transpose of `_tiles`."""
    shape, count = list(v[0].shape), v[0].shape[dim] - 1
    shape[dim] *= 2
    x = v[0].new_empty(shape)
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    torch.sub(v[1], v[2], out=even).add_(v[3])
    even.narrow(dim, 1, count).sub_(v[3].narrow(dim, 0, count))
    torch.add(v[1], v[2], out=odd).sub_(v[0])
    odd.narrow(dim, 0, count).add_(v[0].narrow(dim, 1, count))
    return x


def _outputs(m: Tensors, dim: int, out: Tensor) -> Tensor:
    """Four products with t positions along `dim` -> 2t outputs: m0 + m1 + m2 and m1 - m2 - m3."""
    even, odd = out.unflatten(dim, (-1, 2)).unbind(dim + 1)
    torch.add(m[1], m[0], out=even).add_(m[2])
    torch.sub(m[1], m[2], out=odd).sub_(m[3])
    return out


def _unput(y: Tensor, dim: int) -> Tensor:
    """The transpose of `_outputs`."""
    even, odd = y.unflatten(dim, (-1, 2)).unbind(dim + 1)
    m = y.new_empty(4, *even.shape)
    m[0] = even
    torch.add(even, odd, out=m[1])
    torch.sub(even, odd, out=m[2])
    torch.neg(odd, out=m[3])
    return m


class _Winograd(Function):
    """kernels (16,C_out,C_in): the row's first, then the column's. A few images at a time, which stay in the cache."""

    @staticmethod
    def forward(ctx, x: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernels)
        x = _last(x)
        y = x.new_empty(*x.shape[:3], kernels.shape[1])
        for source, target in _chunks(4 * x[0].numel(), x, y):
            v = _tiles(_tiles(source, 1), 3)  # (column's tile, row's tile, images, h, w, C)
            rows = y.new_empty(4, len(source), source.shape[1] // 2, source.shape[2], y.shape[-1])
            for row, of_columns in enumerate(kernels.unflatten(0, (4, 4))):
                _outputs([product(v[column, row], k) for column, k in enumerate(of_columns)], 2, rows[row])
            del v
            _outputs(rows, 1, target)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved, kernels = ctx.saved_tensors
        x, grad = _last(saved), _last(grad)
        of_x, of_kernels = torch.empty_like(x), torch.zeros_like(kernels)
        for source, upstream, target in _chunks(4 * x[0].numel(), x, grad, of_x):
            m = _unput(_unput(upstream, 1), 3)
            if ctx.needs_input_grad[1]:
                v = _tiles(_tiles(source, 1), 3)
                for number, of_kernel in enumerate(of_kernels):
                    of_kernel += _of_weight(m[number % 4, number // 4], v[number % 4, number // 4])
                del v
            if ctx.needs_input_grad[0]:
                rows = []
                for row, of_columns in enumerate(kernels.unflatten(0, (4, 4))):
                    rows.append(_untiled([product(m[column, row], k.t()) for column, k in enumerate(of_columns)], 2))
                target.copy_(_untiled(rows, 1))
        return _wanted(ctx, of_x.permute(0, 3, 1, 2), of_kernels)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B,C_in,H,W), weight (C_out,C_in,1,1), bias (C_out) -> (B,C_out,H,W)."""
    y = _Pointwise.apply(x, weight.flatten(1))
    return y if bias is None else y + bias[:, None, None]


class _Pointwise(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(_last(x), weight).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = _last(grad)
        return _wanted(ctx, product(grad, weight.t()).permute(0, 3, 1, 2), _of_weight(grad, _last(x)))
