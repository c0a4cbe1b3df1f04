"""RMS norm of every query and key head and its rotary embedding, in one pass.

Axes: N rows, H query heads, G key/value heads, K head.

Bytes read and written per number in bfloat16, counted from each operation's inputs and outputs, not measured; cosines,
sines and weights, which all heads share, left out: forward 54 eager, 4 here; backward 112 eager, 6 here.
"""

from typing import Any

import torch
from torch import Tensor

from unimm.kernels.common import tensor_shapes
from unimm.kernels.dispatch import resolve_backend


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RMS norm over each head, then the rotation of its pairs (i, i + K/2): q [N, H, K], k [N, G, K] -> the same.

    q_weight, k_weight: [K]. cos_sin [2, N, K/2]: cosines and sines of the rotary angles, which get no gradient. Raises
    ValueError where the shapes disagree.
    """
    n, _, width = q.shape
    same_rows = k.shape[::2] == (n, width) and cos_sin.shape == (2, n, width // 2) and not width % 2
    if not same_rows or q_weight.shape != (width,) or k_weight.shape != (width,):
        raise ValueError(
            f"qk_norm_rope got q, k, their weights, cos_sin {tensor_shapes(q, k, q_weight, k_weight, cos_sin)}: "
            "expected [N, H, K], [N, G, K], [K], [K], [2, N, K/2] and an even K"
        )
    run = _norm_rope if resolve_backend("qk_norm_rope", q) == "triton" else norm_rope_reference
    return run(q, q_weight, cos_sin, eps), run(k, k_weight, cos_sin, eps)


def norm_rope_reference(x: Tensor, weight: Tensor, cos_sin: Tensor, eps: float) -> Tensor:
    """The definition for q or for k: nn.layers.RMSNorm and nn.rope.apply_rope, operation for operation."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    a, b = ((wide * scale).to(x.dtype) * weight).chunk(2, -1)
    cos, sin = cos_sin[:, :, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


@torch.library.custom_op("unimm::norm_rope", mutates_args=())
def _norm_rope(x: Tensor, weight: Tensor, cos_sin: Tensor, eps: float) -> Tensor:
    from unimm.kernels import qk_norm_rope_triton

    return qk_norm_rope_triton.launch_norm_rope(x, weight, cos_sin, eps)


@_norm_rope.register_fake
def _(x: Tensor, weight: Tensor, cos_sin: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("unimm::norm_rope_backward", mutates_args=())
def _norm_rope_backward(grad: Tensor, x: Tensor, weight: Tensor, cos_sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from unimm.kernels import qk_norm_rope_triton

    return qk_norm_rope_triton.launch_norm_rope_backward(grad, x, weight, cos_sin, eps)


@_norm_rope_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, cos_sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, cos_sin, ctx.eps = inputs
    ctx.save_for_backward(x, weight, cos_sin)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    return (*_norm_rope_backward(grad, *ctx.saved_tensors, ctx.eps), None, None)


_norm_rope.register_autograd(_backward, setup_context=_setup_context)
