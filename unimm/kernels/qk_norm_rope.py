"""RMS norm of every query and key head and its rotary turn in one pass, with weights of the row's expert.

Axes: N rows, H query heads, G key/value heads, K head, E experts.

Bytes read and written a number in bfloat16, counted from each operation's inputs and outputs, not measured; angles and
weights, which all heads share, left out: forward 54 eager, 4 here; backward 112 eager, 6 here.
"""

from typing import Any

import torch
from torch import Tensor

from unimm.kernels.common import tensor_shapes
from unimm.kernels.dispatch import resolve_backend


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    eps: float,
    *,
    expert: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS norm over each head, then the turn of its pairs (i, i + K/2): q [N, H, K], k [N, G, K] -> the same, same dtypes.

    q_weight, k_weight: [K], or [E, K] with `expert` [N] int32, the expert that owns each row. angles [2, N, K/2] are
    cosines and sines, which get no gradient. Raises ValueError where the shapes disagree.
    """
    q_weight, k_weight = (w[None] if w.ndim == 1 else w for w in (q_weight, k_weight))
    n, _, width = q.shape
    same_rows = k.shape[::2] == (n, width) and cos_sin.shape == (2, n, width // 2) and not width % 2
    if not same_rows or q_weight.shape != k_weight.shape or q_weight.shape[1] != width:
        raise ValueError(
            f"qk_norm_rope got q, k, their weights, angles {tensor_shapes(q, k, q_weight, k_weight, cos_sin)}: "
            "expected [N, H, K], [N, G, K], [E, K], [E, K], [2, N, K/2] and an even K"
        )
    if (expert is None) != (len(q_weight) == 1) or (expert is not None and expert.shape != (n,)):
        found = None if expert is None else tuple(expert.shape)
        raise ValueError(
            f"qk_norm_rope got weights of {len(q_weight)} experts, expert {found}: expected [N] for more than one"
        )
    run = _norm_rope if resolve_backend("qk_norm_rope", q) == "triton" else norm_rope_reference
    return run(q, q_weight, expert, cos_sin, eps), run(k, k_weight, expert, cos_sin, eps)


def norm_rope_reference(x: Tensor, weight: Tensor, expert: Tensor | None, cos_sin: Tensor, eps: float) -> Tensor:
    """The definition for one of q and k, operation for operation: layers.RMSNorm with each row's weight, layers.apply_rope."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    weight = weight if expert is None else weight.index_select(0, expert)
    a, b = ((wide * scale).to(x.dtype) * weight[:, None]).chunk(2, -1)
    cos, sin = cos_sin[:, :, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


@torch.library.custom_op("unimm::norm_rope", mutates_args=())
def _norm_rope(x: Tensor, weight: Tensor, expert: Tensor | None, angles: Tensor, eps: float) -> Tensor:
    from unimm.kernels import qk_norm_rope_triton

    return qk_norm_rope_triton.launch_norm_rope(x, weight, expert, angles, eps)


@_norm_rope.register_fake
def _(x: Tensor, weight: Tensor, expert: Tensor | None, angles: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("unimm::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, expert: Tensor | None, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from unimm.kernels import qk_norm_rope_triton

    return qk_norm_rope_triton.launch_norm_rope_backward(grad, x, weight, expert, angles, eps)


@_norm_rope_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, expert: Tensor | None, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, expert, angles, ctx.eps = inputs
    ctx.save_for_backward(x, weight, expert, angles)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    return (*_norm_rope_backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None)


_norm_rope.register_autograd(_backward, setup_context=_setup_context)
