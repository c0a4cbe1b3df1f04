"""RMS norm of every head and its rotary turn in one pass, forward and backward, in Triton.

A program owns a tile of heads: pair (n, h) of row and head is number n H + h, so neighbours in memory are neighbours in
a tile, and what a row shares (angles, its expert's weights) is found by the division and comes from the cache. The two
halves of a head, which the turn mixes, are two tiles.
"""
# triton reads the signatures of kernels; types here would be types of pointers, which have no names
# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from unimm.kernels.common import contiguous_heads

ENTRIES = 2048  # of half a tile
PROGRAMS = 512  # of the backward kernel, which leave as many sums of gradients to add


def head_tile_shape(half: int, experts: int) -> tuple[int, int]:
    """(heads, columns) of half a tile; backward keeps a copy of it an expert."""
    columns = triton.next_power_of_2(half)
    return max(1, min(32, ENTRIES // columns // experts)), columns


@triton.jit(do_not_specialize=["n"])
def norm_rope_kernel(
    x_ptr, weight_ptr, expert_ptr, angles_ptr, out_ptr, n, x_row, x_head, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """EXPERTS 1: expert_ptr is not read."""
    pairs = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    rows = pairs // HEADS
    here = rows < n
    inside = here[:, None] & (columns < HALF)[None, :]
    at = x_ptr + (rows * x_row + pairs % HEADS * x_head)[:, None] + columns[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    expert = tl.zeros([ROWS], tl.int32)
    if EXPERTS > 1:
        expert = tl.load(expert_ptr + rows, mask=here, other=0)
    weights = weight_ptr + expert[:, None] * (2 * HALF) + columns[None, :]
    weight_a = tl.load(weights, mask=inside, other=0.0).to(tl.float32)
    weight_b = tl.load(weights + HALF, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    a = a * scale * weight_a
    b = b * scale * weight_b
    angles = angles_ptr + rows[:, None] * HALF + columns[None, :]
    cos = tl.load(angles, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(angles + tl.cast(n, tl.int64) * HALF, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + pairs[:, None] * (2 * HALF) + columns[None, :]
    tl.store(out, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def norm_rope_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, expert_ptr, angles_ptr, dx_ptr, dweight_ptr, n, grad_row, grad_head, x_row, x_head, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Turn the gradient back, then as for RMS norm; dweight [programs, EXPERTS, 2 HALF]. SLOTS: EXPERTS up to a power of 2."""
    columns = tl.arange(0, COLUMNS)
    slots = tl.arange(0, SLOTS)
    dweight_a = tl.zeros([SLOTS, COLUMNS], tl.float32)
    dweight_b = tl.zeros([SLOTS, COLUMNS], tl.float32)
    for i in range(tl.program_id(0), tl.cdiv(n * HEADS, ROWS), tl.num_programs(0)):
        pairs = (i * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        rows = pairs // HEADS
        head = pairs % HEADS
        here = rows < n
        inside = here[:, None] & (columns < HALF)[None, :]
        at = x_ptr + (rows * x_row + head * x_head)[:, None] + columns[None, :]
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        at = grad_ptr + (rows * grad_row + head * grad_head)[:, None] + columns[None, :]
        grad_a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        grad_b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        angles = angles_ptr + rows[:, None] * HALF + columns[None, :]
        cos = tl.load(angles, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(angles + tl.cast(n, tl.int64) * HALF, mask=inside, other=0.0).to(tl.float32)
        turned_a = grad_a * cos + grad_b * sin
        turned_b = grad_b * cos - grad_a * sin
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        a = a * scale
        b = b * scale
        expert = tl.zeros([ROWS], tl.int32)
        if EXPERTS > 1:
            expert = tl.load(expert_ptr + rows, mask=here, other=0)
            mine = (slots[:, None] == expert[None, :])[:, :, None]
            dweight_a += tl.sum(tl.where(mine, (turned_a * a)[None, :, :], 0.0), 1)
            dweight_b += tl.sum(tl.where(mine, (turned_b * b)[None, :, :], 0.0), 1)
        else:
            dweight_a += tl.sum(turned_a * a, 0)[None, :]
            dweight_b += tl.sum(turned_b * b, 0)[None, :]
        weights = weight_ptr + expert[:, None] * (2 * HALF) + columns[None, :]
        turned_a = turned_a * tl.load(weights, mask=inside, other=0.0).to(tl.float32)
        turned_b = turned_b * tl.load(weights + HALF, mask=inside, other=0.0).to(tl.float32)
        mean = ((tl.sum(turned_a * a, 1) + tl.sum(turned_b * b, 1)) / (2 * HALF))[:, None]
        at = dx_ptr + pairs[:, None] * (2 * HALF) + columns[None, :]
        tl.store(at, (scale * (turned_a - a * mean)).to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(at + HALF, (scale * (turned_b - b * mean)).to(dx_ptr.dtype.element_ty), mask=inside)
    at = dweight_ptr + (tl.program_id(0) * EXPERTS + slots)[:, None] * (2 * HALF) + columns[None, :]
    inside = (slots < EXPERTS)[:, None] & (columns < HALF)[None, :]
    tl.store(at, dweight_a, mask=inside)
    tl.store(at + HALF, dweight_b, mask=inside)


def launch_norm_rope(x: Tensor, weight: Tensor, expert: Tensor | None, angles: Tensor, eps: float) -> Tensor:
    """x [N, H, K], weight [E, K], expert [N] or None, angles [2, N, K/2] -> [N, H, K] in x's dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = contiguous_heads(x)
    n, heads, width = x.shape
    rows, columns = head_tile_shape(width // 2, 1)
    if x.numel():
        with torch.cuda.device_of(x):
            norm_rope_kernel[(triton.cdiv(n * heads, rows),)](
                x, weight.contiguous(), expert, angles.contiguous(), out, n, x.stride(0), x.stride(1), eps,
                HEADS=heads, HALF=width // 2, ROWS=rows, COLUMNS=columns, EXPERTS=1 if expert is None else len(weight),
                num_warps=4,
            )  # fmt: skip
    return out


def launch_norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, expert: Tensor | None, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(dx [N, H, K], dweight [E, K])."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, grad = contiguous_heads(x), contiguous_heads(grad)
    n, heads, width = x.shape
    experts = 1 if expert is None else len(weight)
    slots = triton.next_power_of_2(experts)
    rows, columns = head_tile_shape(width // 2, slots)
    programs = min(PROGRAMS, triton.cdiv(n * heads, rows))
    sums = torch.empty(programs, experts, width, dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            norm_rope_backward_kernel[(programs,)](
                grad, x, weight.contiguous(), expert, angles.contiguous(), dx, sums, n,
                grad.stride(0), grad.stride(1), x.stride(0), x.stride(1), eps,
                HEADS=heads, HALF=width // 2, ROWS=rows, COLUMNS=columns, EXPERTS=experts, SLOTS=slots, num_warps=4,
            )  # fmt: skip
    return dx, sums.sum(0).to(weight.dtype)
