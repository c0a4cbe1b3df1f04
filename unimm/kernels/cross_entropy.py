"""Cross entropy of a linear head that never holds its [N, V] logits, only those of a chunk of rows.

Axes: N rows, D model, V vocabulary.

The logits of a chunk are computed, reduced to their log-sum-exp and dropped; backward computes them again. That costs a
fourth matrix product beside the three of plain cross entropy, and saves the [N, V] logits, their float32 copy, their
softmax and its gradient: 14 N V bytes at the peak in bfloat16, 12 in float32 (counted), which for 8192 rows of 152 064
ids are 17 GB. Liger-Kernel's fused loss (arXiv 2410.10989, section 3.2) computes the gradient in the forward pass and
so needs a scalar loss; this one returns a loss per row, and takes any gradient for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unimm.kernels.common import autocast_tensors, tensor_shapes

MAX_LOGITS = 2**24  # held at once: 64 MiB in float32
MIN_CHUNK_ROWS = 512  # whatever the vocabulary: with fewer, a product reads the weight for longer than it computes


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, chunk_rows: int | None = None
) -> Tensor:
    """-log softmax(x weight^T)[label] for every row: x [N, D], weight [V, D], labels [N] integers -> [N] float32.

    A row whose label is `ignore_index` has loss 0 and no gradient. chunk_rows: rows computed at once; unless given as
    many as make 64 MiB of logits, but at least 512. Matrix products are in x's dtype (or autocast's), all else in
    float32. Raises ValueError where the shapes or dtypes disagree.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        got = tensor_shapes(x, weight, labels)
        raise ValueError(f"linear_cross_entropy got x, weight, labels {got}: expected [N, D], [V, D], [N]")
    x, weight = autocast_tensors(x, weight)
    if x.dtype != weight.dtype:
        raise ValueError(f"linear_cross_entropy got x {x.dtype}, weight {weight.dtype}: expected one dtype; cast one")
    chunk_rows = max(MIN_CHUNK_ROWS, MAX_LOGITS // max(1, weight.shape[0])) if chunk_rows is None else chunk_rows
    return _linear_cross_entropy(x, weight, labels, ignore_index, chunk_rows)[0]


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The definition, with all logits."""
    return torch.nn.functional.cross_entropy(
        (x @ weight.t()).float(), labels, ignore_index=ignore_index, reduction="none"
    )


def _chunk_logits(x: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Float32 logits of some rows, written to the buffer's first rows."""
    out = buffer[: len(x)]
    if x.dtype == torch.float32:
        return torch.mm(x, weight.t(), out=out)
    return out.copy_(x @ weight.t())


def _logits_buffer(x: Tensor, weight: Tensor, chunk_rows: int) -> Tensor:
    return x.new_empty(min(chunk_rows, len(x)), len(weight), dtype=torch.float32)


def _loss_by_chunk(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """(loss [N], log-sum-exp [N])."""
    loss, lse = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    buffer = _logits_buffer(x, weight, chunk_rows)
    for start in range(0, len(x), chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = _chunk_logits(x[rows], weight, buffer)
        label = labels[rows].masked_fill(labels[rows] == ignore_index, 0)
        found = logits.gather(1, label[:, None]).squeeze(1)
        top = logits.amax(1)
        lse[rows] = logits.sub_(top[:, None]).exp_().sum(1).log_() + top
        loss[rows] = lse[rows] - found
    return loss.masked_fill_(labels == ignore_index, 0.0), lse


@torch.library.custom_op("unimm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    return _loss_by_chunk(x, weight, labels, ignore_index, chunk_rows)


@_linear_cross_entropy.register_fake
def _(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk_rows: int) -> tuple[Tensor, Tensor]:
    loss = x.new_empty(x.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss)


def _gradients_by_chunk(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    chunk_rows: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) by d logits = grad (softmax - onehot), chunk by chunk; a gradient that is not needed is empty."""
    dx = torch.empty_like(x) if needs_grad[0] else x.new_empty(0)
    # chunks are summed in float32, whatever the dtype
    dweight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad[1] else weight.new_empty(0)
    grad = grad.masked_fill(labels == ignore_index, 0.0)
    buffer = _logits_buffer(x, weight, chunk_rows)
    for start in range(0, len(x), chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = _chunk_logits(x[rows], weight, buffer)
        dlogits = logits.sub_(lse[rows, None]).exp_().mul_(grad[rows, None])
        label = labels[rows].masked_fill(labels[rows] == ignore_index, 0)
        dlogits.scatter_add_(1, label[:, None], -grad[rows, None])
        dlogits = dlogits.to(x.dtype)
        if needs_grad[0]:
            dx[rows] = dlogits @ weight
        if needs_grad[1] and x.dtype == torch.float32:
            dweight.addmm_(dlogits.t(), x[rows])
        elif needs_grad[1]:
            dweight += dlogits.t() @ x[rows]
    return dx, dweight.to(weight.dtype)


@torch.library.custom_op("unimm::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    chunk_rows: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor]:
    return _gradients_by_chunk(grad, x, weight, labels, lse, ignore_index, chunk_rows, needs_grad)


@_linear_cross_entropy_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    chunk_rows: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if needs_grad[0] else x.new_empty(0)
    return dx, torch.empty_like(weight) if needs_grad[1] else weight.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, labels, ctx.ignore_index, ctx.chunk_rows = inputs
    ctx.save_for_backward(x, weight, labels, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    x, weight, labels, lse = ctx.saved_tensors
    needs_grad = list(ctx.needs_input_grad[:2])
    dx, dweight = _linear_cross_entropy_backward(
        grad, x, weight, labels, lse, ctx.ignore_index, ctx.chunk_rows, needs_grad
    )
    return dx if needs_grad[0] else None, dweight if needs_grad[1] else None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)

# what the ops run, by their names, for those who count what that allocates
OP_BODIES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "unimm::linear_cross_entropy": _loss_by_chunk,
    "unimm::linear_cross_entropy_backward": _gradients_by_chunk,
}
