"""The frozen image tower of CLIP with the same numbers (up to rounding) in less time.

open_clip's blocks go through PyTorch's MultiheadAttention, which turns the batch around, so that the products of
queries, keys and values become one small product for each token. Here it is one large product. And where the
matrix library at hand is not made for the processor, products go to oneDNN, which also does the convolutions.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F


@cache
def onednn_is_faster() -> bool:
    """Whether products go to oneDNN: PyTorch's CPU build with MKL, on a processor that is not Intel's.

    MKL keeps its widest vector instructions for Intel's processors; elsewhere oneDNN reaches about twice its rate.
    """
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not libraries or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class _FrozenProduct(Function):
    """x W^T + b by oneDNN; gradients for x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        return frozen_linear(grad, weight.t(), None), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with weights that want no gradient. x (...,C_in), weight (C_out,C_in), bias (C_out) or None."""
    single = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not weight.requires_grad
    if torch.compiler.is_compiling() or not single or torch.is_autocast_enabled("cpu") or not onednn_is_faster():
        return F.linear(x, weight, bias)
    return _FrozenProduct.apply(x.reshape(-1, x.shape[-1]), weight, bias).unflatten(0, x.shape[:-1])


class FrozenLinear(nn.Linear):
    """A linear layer whose weights never learn."""

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


class FrozenAttention(nn.MultiheadAttention):
    """Self-attention (batch first, without dropout). Its weights may learn, by PyTorch's own products."""

    def forward(  # type: ignore[override]  # the arguments that open_clip gives
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query, key, value: the same tokens (B,L,C) -> (B,L,C)."""
        if key is not query or value is not query or need_weights:
            raise ValueError("the frozen attention is self-attention, and does not return its weights")
        projected = frozen_linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = projected.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return frozen_linear(mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias), None


def accelerate_tower(visual: nn.Module, on: bool = True) -> None:
    """Give attention and linear layers of an image tower's blocks their fast form, in place; `on=False`: the plain."""
    for block in visual.get_submodule("transformer.resblocks").children():
        attention: Any = getattr(block, "attn", None)  # of open_clip's plain block, or the small CLIP's
        if type(attention) not in (nn.MultiheadAttention, FrozenAttention) or not attention.batch_first:
            continue
        if not attention.dropout and attention._qkv_same_embed_dim and attention.bias_k is None:
            attention.__class__ = FrozenAttention if on else nn.MultiheadAttention
            for layer in block.get_submodule("mlp").children():
                if type(layer) in (nn.Linear, FrozenLinear):
                    layer.__class__ = FrozenLinear if on else nn.Linear
