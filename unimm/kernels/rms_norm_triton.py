"""RMS norm and AdaLN modulation in Triton, forward and backward.

A program owns a tile of whole rows, so a norm is a reduction inside a program. Backward kernels compute the norm again
from the row, which they read anyway, and take every n-th tile, n programs in all, adding up the gradients of weights in
registers; PyTorch adds the programs' sums. No atomics: results repeat bit for bit.
"""
# triton reads the signatures of kernels; types here would be types of pointers, which have no names
# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from unimm.kernels.common import as_rows

ENTRIES = 4096  # numbers of a tile: several rows share a program where they fit
PROGRAMS = 512  # of a backward kernel; each writes sums of gradients, which are added afterwards


def row_tile_shape(width: int, most: int = 16) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile of whole rows."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(most, ENTRIES // columns))
    # 16 numbers of a row per thread: backward holds six such rows
    return rows, columns, min(16, max(4, rows * columns // 512))


@triton.jit(do_not_specialize=["n"])
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, n, x_row, eps, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The order of nn.layers.RMSNorm: float32 up to the cast back to x's dtype, then times the weight."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row + columns[None, :], mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)
    out = (wide * scale[:, None]).to(x.dtype).to(tl.float32) * weight[None, :]
    tl.store(out_ptr + rows[:, None] * D + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def rms_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr, n, grad_row, x_row, eps,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With u = x r, r = 1 / rms(x), g = grad weight: dx = r (g - u mean(g u)), dweight = sum over rows of grad u."""
    columns = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    dweight = tl.zeros([COLUMNS], tl.float32)
    for i in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        rows = (i * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < n)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row + columns[None, :], mask=inside, other=0.0)
        grad = tl.load(grad_ptr + rows[:, None] * grad_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)
        unit = wide * scale[:, None]
        dweight += tl.sum(grad * unit.to(x.dtype).to(tl.float32), 0)
        grad = grad * weight[None, :]
        dx = scale[:, None] * (grad - unit * (tl.sum(grad * unit, 1) / D)[:, None])
        tl.store(dx_ptr + rows[:, None] * D + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + tl.program_id(0) * D + columns, dweight, mask=columns < D)


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in the dtype that both promote to."""
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    rows = as_rows(x)
    n, d = rows.shape
    tile_rows, columns, warps = row_tile_shape(d)
    if n:
        with torch.cuda.device_of(x):
            rms_norm_kernel[(triton.cdiv(n, tile_rows),)](
                rows, weight.contiguous(), out, n, rows.stride(0), eps, D=d, ROWS=tile_rows, COLUMNS=columns, num_warps=warps
            )
    return out


def launch_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx [..., D], dweight [D])."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = as_rows(x)
    grads = as_rows(grad)
    n, d = rows.shape
    tile_rows, columns, warps = row_tile_shape(d)
    programs = min(PROGRAMS, triton.cdiv(n, tile_rows))
    sums = torch.empty(programs, d, dtype=torch.float32, device=x.device)
    if n:
        with torch.cuda.device_of(x):
            rms_norm_backward_kernel[(programs,)](
                grads, rows, weight.contiguous(), dx, sums, n, grads.stride(0), rows.stride(0), eps,
                D=d, ROWS=tile_rows, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
    return dx, sums.sum(0).to(weight.dtype)


# ---- AdaLN modulation


@triton.jit(do_not_specialize=["n", "length"])
def modulate_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, n, length, x_row, eps, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """layer_norm(x) (1 + scale) + shift; rows of all samples end to end, `length` per sample."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < D)[None, :]
    of_sample = (rows // length)[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + of_sample, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + of_sample, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    unit = centred * tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
    out = unit * (1.0 + scale) + shift
    tl.store(out_ptr + rows[:, None] * D + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def modulate_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, dx_ptr, dscale_ptr, dshift_ptr, length, grad_row, x_row, eps,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (sample, j) takes tiles j, j + programs, ... of a sample.

    With u = layer_norm(x), r = 1 / its deviation, g = grad (1 + scale): dx = r (g - mean(g) - u mean(g u)); over the
    sample's rows dscale = sum of grad u, dshift = sum of grad.
    """
    columns = tl.arange(0, COLUMNS)
    sample = tl.program_id(0).to(tl.int64)
    scale = 1.0 + tl.load(scale_ptr + sample * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    dscale = tl.zeros([COLUMNS], tl.float32)
    dshift = tl.zeros([COLUMNS], tl.float32)
    for i in range(tl.program_id(1), tl.cdiv(length, ROWS), tl.num_programs(1)):
        local = i * ROWS + tl.arange(0, ROWS)
        rows = sample * length + local
        inside = (local < length)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows[:, None] * grad_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - (tl.sum(x, 1) / D)[:, None], 0.0)
        over = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
        unit = centred * over
        dscale += tl.sum(grad * unit, 0)
        dshift += tl.sum(grad, 0)
        grad = grad * scale[None, :]
        dx = over * (grad - (tl.sum(grad, 1) / D)[:, None] - unit * (tl.sum(grad * unit, 1) / D)[:, None])
        tl.store(dx_ptr + rows[:, None] * D + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    at = (sample * tl.num_programs(1) + tl.program_id(1)) * D + columns
    tl.store(dscale_ptr + at, dscale, mask=columns < D)
    tl.store(dshift_ptr + at, dshift, mask=columns < D)


def launch_adaln_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """x [B, L, D], scale and shift [B, D] -> [B, L, D] in x's dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = as_rows(x)
    n, d = rows.shape
    tile_rows, columns, warps = row_tile_shape(d)
    if n:
        with torch.cuda.device_of(x):
            modulate_kernel[(triton.cdiv(n, tile_rows),)](
                rows, scale.contiguous(), shift.contiguous(), out, n, x.shape[1], rows.stride(0), eps,
                D=d, ROWS=tile_rows, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
    return out


def launch_adaln_modulate_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [B, L, D], dscale and dshift [B, D])."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = as_rows(x)
    grads = as_rows(grad)
    b, length, d = x.shape
    tile_rows, columns, warps = row_tile_shape(d)
    programs = min(max(1, PROGRAMS // max(1, b)), triton.cdiv(length, tile_rows))
    dscale, dshift = (torch.empty(b, programs, d, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows.numel():
        with torch.cuda.device_of(x):
            modulate_backward_kernel[(b, programs)](
                grads, rows, scale.contiguous(), dx, dscale, dshift, length, grads.stride(0), rows.stride(0), eps,
                D=d, ROWS=tile_rows, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
    return dx, dscale.sum(1).to(scale.dtype), dshift.sum(1).to(scale.dtype)
