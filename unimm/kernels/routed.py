"""Linear layers of several experts over rows grouped by expert: each row meets the weights of its own expert alone.

Axes: N rows, D in, F out, E experts.

Two ways, by how the weights are held. A list of E weights (modules of their own): each expert's rows are a slice, one
matrix product a slice, written straight into the output. Eager slices and a `cat` move 4 F N more bytes forward and
4 D N more backward in bfloat16 (counted, not measured: the copies of y and of dx). One tensor [E, F, D] goes through
`grouped_mm`, which reads the sizes on the device. A kernel that gathers rows itself would only pay where rows are not
grouped already; here they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unimm.kernels.common import autocast_tensors


def routed_linear(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    sizes: Sequence[int] | Tensor,
    bias: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """W[e] x + b[e] for rows x [N, D] of experts 0, 0, ..., 1, ... -> [N, F]. Follows autocast.

    weights: E of [F, D], or one [E, F, D]; bias likewise [F] or [E, F]. sizes: how many rows each expert owns, none
    allowed; as an integer tensor [E] they stay on the device, where nobody checks that they add up to N. Raises
    ValueError where the shapes disagree.
    """
    n_experts = len(weights)
    shapes = {tuple(w.shape) for w in weights}
    if len(shapes) != 1 or x.ndim != 2 or next(iter(shapes))[1:] != x.shape[1:]:
        raise ValueError(
            f"got x {tuple(x.shape)}, weights {sorted(shapes)}: expected x [N, D] and weights [F, D] of one shape"
        )
    if len(sizes) != n_experts or (bias is not None and len(bias) != n_experts):
        raise ValueError(
            f"got {len(sizes)} sizes for {n_experts} weights: expected a size (and a bias, if any) an expert"
        )
    if not isinstance(sizes, Tensor) and sum(sizes) != len(x):
        raise ValueError(f"got {len(x)} rows, sizes {list(sizes)}: expected sizes that add up to the rows")
    if isinstance(weights, Tensor):
        x, weights = autocast_tensors(x, weights)
        if not isinstance(sizes, Tensor):
            sizes = torch.tensor(sizes, device=x.device)
        if _grouped_runs(x, weights):
            return _grouped(x, weights, sizes, bias)
        weights = weights.unbind()
    if isinstance(sizes, Tensor):
        sizes = sizes.tolist()
    x, *cast = autocast_tensors(x, *weights, *(() if bias is None else bias))
    return _sliced(x, cast[:n_experts], cast[n_experts:], sizes)


def routed_linear_reference(
    x: Tensor, weights: Tensor | Sequence[Tensor], sizes: Sequence[int], bias: Tensor | Sequence[Tensor] | None = None
) -> Tensor:
    """The definition: a linear a slice."""
    parts = x.split(list(sizes))
    return torch.cat(
        [
            F.linear(part, w, None if bias is None else bias[i])
            for i, (part, w) in enumerate(zip(parts, weights, strict=True))
        ]
    )


# ---- one tensor of weights


class _Contiguous(torch.autograd.Function):
    """Nothing forward; backward lays the gradient out in memory, which grouped_mm's own backward asks for."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _grouped_runs(x: Tensor, weights: Tensor) -> bool:
    """torch.nn.functional.grouped_mm came with 2.10, and wants rows that begin at multiples of 16 bytes."""
    aligned = all(d * x.element_size() % 16 == 0 for d in weights.shape[1:])
    return "grouped_mm" in dir(F) and aligned and len(x) > 0


def _grouped(x: Tensor, weights: Tensor, sizes: Tensor, bias: Tensor | Sequence[Tensor] | None) -> Tensor:
    ends = sizes.cumsum(0, dtype=torch.int32)
    y = _Contiguous.apply(F.grouped_mm(x.contiguous(), weights.transpose(1, 2), offs=ends))
    if bias is None:
        return y
    bias = bias if isinstance(bias, Tensor) else torch.stack(list(bias))
    # the expert of each row: how many experts end at or before it
    expert = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=torch.int32), right=True)
    return y + bias.to(y.dtype).index_select(0, expert)


# ---- a list of weights


@torch.library.custom_op("unimm::routed_linear", mutates_args=())
def _sliced(x: Tensor, weights: Sequence[Tensor], bias: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    y = x.new_empty(len(x), weights[0].shape[0])
    for i, (rows, out) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
        if bias:
            torch.addmm(bias[i], rows, weights[i].t(), out=out)
        else:
            torch.mm(rows, weights[i].t(), out=out)
    return y


@_sliced.register_fake
def _(x: Tensor, weights: Sequence[Tensor], bias: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0])


@torch.library.custom_op("unimm::routed_linear_weights", mutates_args=())
def _weight_gradients(grad: Tensor, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [torch.mm(g.t(), rows) for g, rows in zip(grad.split(sizes), x.split(sizes), strict=True)]


@_weight_gradients.register_fake
def _(grad: Tensor, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [x.new_empty(grad.shape[1], x.shape[1]) for _ in sizes]


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weights, bias, sizes = inputs
    ctx.save_for_backward(x, *weights)
    ctx.sizes, ctx.biased = sizes, bool(bias)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, *weights = ctx.saved_tensors
    wants_x, wants_weights, wants_bias, _ = ctx.needs_input_grad
    dx = _sliced(grad, [w.t() for w in weights], [], ctx.sizes) if wants_x else None
    dw = _weight_gradients(grad, x, ctx.sizes) if any(_each(wants_weights)) else [None] * len(weights)
    db: list[Tensor | None] = [None] * len(weights) if ctx.biased else []
    if ctx.biased and any(_each(wants_bias)):
        db = [g.sum(0) for g in grad.split(ctx.sizes)]
    return dx, dw, db, None


def _each(wants: bool | Sequence[bool]) -> Sequence[bool]:
    return [wants] if isinstance(wants, bool) else wants


_sliced.register_autograd(_backward, setup_context=_keep)
