"""RMS norm of every head and its rotary embedding in one pass, forward and backward, in Triton.

A program owns a tile of heads: the pair (n, h) of row and head has the number n H + h, so neighbours in memory are
neighbours in a tile; the cosines and sines of a row, which its heads share, are found by the division and come from the
cache. The two halves of a head, which the rotation mixes, are two tiles.
"""
# triton reads the signatures of kernels; types here would be types of pointers, which have no names
# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from unimm.kernels.common import contiguous_heads

ENTRIES = 2048  # numbers of half a tile
PROGRAMS = 512  # of the backward kernel; each writes sums of gradients, which are added afterwards


def head_tile_shape(half: int) -> tuple[int, int]:
    """(heads, columns) of half a tile of heads that are 2 `half` wide."""
    columns = triton.next_power_of_2(half)
    return max(1, min(32, ENTRIES // columns)), columns


@triton.jit(do_not_specialize=["n"])
def norm_rope_kernel(
    x_ptr, weight_ptr, cos_sin_ptr, out_ptr, n, x_row, x_head, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program a tile of ROWS heads."""
    pairs = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    rows = pairs // HEADS
    inside = (rows < n)[:, None] & (columns < HALF)[None, :]
    at = x_ptr + (rows * x_row + pairs % HEADS * x_head)[:, None] + columns[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    weight_a = tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    weight_b = tl.load(weight_ptr + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    a = a * scale * weight_a[None, :]
    b = b * scale * weight_b[None, :]
    cos_at = cos_sin_ptr + rows[:, None] * HALF + columns[None, :]
    cos = tl.load(cos_at, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(cos_at + tl.cast(n, tl.int64) * HALF, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + pairs[:, None] * (2 * HALF) + columns[None, :]
    tl.store(out, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def norm_rope_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, cos_sin_ptr, dx_ptr, dweight_ptr, n, grad_row, grad_head, x_row, x_head, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rotate the gradient back, then as for RMS norm; dweight [programs, 2 HALF]."""
    columns = tl.arange(0, COLUMNS)
    weight_a = tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    weight_b = tl.load(weight_ptr + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    dweight_a = tl.zeros([COLUMNS], tl.float32)
    dweight_b = tl.zeros([COLUMNS], tl.float32)
    for i in range(tl.program_id(0), tl.cdiv(n * HEADS, ROWS), tl.num_programs(0)):
        pairs = (i * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        rows = pairs // HEADS
        head = pairs % HEADS
        inside = (rows < n)[:, None] & (columns < HALF)[None, :]
        at = x_ptr + (rows * x_row + head * x_head)[:, None] + columns[None, :]
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        at = grad_ptr + (rows * grad_row + head * grad_head)[:, None] + columns[None, :]
        grad_a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        grad_b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        cos_at = cos_sin_ptr + rows[:, None] * HALF + columns[None, :]
        cos = tl.load(cos_at, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(cos_at + tl.cast(n, tl.int64) * HALF, mask=inside, other=0.0).to(tl.float32)
        rotated_a = grad_a * cos + grad_b * sin
        rotated_b = grad_b * cos - grad_a * sin
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        a = a * scale
        b = b * scale
        dweight_a += tl.sum(rotated_a * a, 0)
        dweight_b += tl.sum(rotated_b * b, 0)
        rotated_a = rotated_a * weight_a[None, :]
        rotated_b = rotated_b * weight_b[None, :]
        mean = ((tl.sum(rotated_a * a, 1) + tl.sum(rotated_b * b, 1)) / (2 * HALF))[:, None]
        at = dx_ptr + pairs[:, None] * (2 * HALF) + columns[None, :]
        tl.store(at, (scale * (rotated_a - a * mean)).to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(at + HALF, (scale * (rotated_b - b * mean)).to(dx_ptr.dtype.element_ty), mask=inside)
    at = dweight_ptr + tl.program_id(0) * (2 * HALF) + columns
    tl.store(at, dweight_a, mask=columns < HALF)
    tl.store(at + HALF, dweight_b, mask=columns < HALF)


def launch_norm_rope(x: Tensor, weight: Tensor, cos_sin: Tensor, eps: float) -> Tensor:
    """x [N, H, K], weight [K], cos_sin [2, N, K/2] -> [N, H, K] in x's dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = contiguous_heads(x)
    n, heads, width = x.shape
    rows, columns = head_tile_shape(width // 2)
    if x.numel():
        with torch.cuda.device_of(x):
            norm_rope_kernel[(triton.cdiv(n * heads, rows),)](
                x, weight.contiguous(), cos_sin.contiguous(), out, n, x.stride(0), x.stride(1), eps,
                HEADS=heads, HALF=width // 2, ROWS=rows, COLUMNS=columns, num_warps=4,
            )  # fmt: skip
    return out


def launch_norm_rope_backward(grad: Tensor, x: Tensor, weight: Tensor, cos_sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx [N, H, K], dweight [K])."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = contiguous_heads(x)
    grad = contiguous_heads(grad)
    n, heads, width = x.shape
    rows, columns = head_tile_shape(width // 2)
    programs = min(PROGRAMS, triton.cdiv(n * heads, rows))
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            norm_rope_backward_kernel[(programs,)](
                grad, x, weight.contiguous(), cos_sin.contiguous(), dx, sums, n,
                grad.stride(0), grad.stride(1), x.stride(0), x.stride(1), eps,
                HEADS=heads, HALF=width // 2, ROWS=rows, COLUMNS=columns, num_warps=4,
            )  # fmt: skip
    return dx, sums.sum(0).to(weight.dtype)
