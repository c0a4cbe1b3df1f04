"""silu(gate) * up in Triton, forward and backward: a program owns a piece of one row."""
# triton reads the signatures of kernels; types here would be types of pointers, which have no names
# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from unimm.kernels.common import as_rows

MAX_COLUMNS = 2048  # of a program


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, F: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (row, piece of its columns)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(gate_ptr + row * gate_row + columns, mask=columns < F, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + columns, mask=columns < F, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * F + columns, out.to(out_ptr.dtype.element_ty), mask=columns < F)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, grad_row, gate_row, up_row, F: tl.constexpr, COLUMNS: tl.constexpr
):
    """With s = sigmoid(gate): dup = grad gate s, dgate = grad up s (1 + gate (1 - s))."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    grad = tl.load(grad_ptr + row * grad_row + columns, mask=columns < F, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + columns, mask=columns < F, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + columns, mask=columns < F, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = grad * up * s * (1.0 + gate * (1.0 - s))
    dup = grad * gate * s
    tl.store(dgate_ptr + row * F + columns, dgate.to(dgate_ptr.dtype.element_ty), mask=columns < F)
    tl.store(dup_ptr + row * F + columns, dup.to(dup_ptr.dtype.element_ty), mask=columns < F)


def launch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [..., F] of one dtype -> [..., F]."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gates = as_rows(gate)
    ups = as_rows(up)
    n, f = gates.shape
    columns = min(MAX_COLUMNS, triton.next_power_of_2(f))
    if out.numel():
        with torch.cuda.device_of(gate):
            swiglu_kernel[(n, triton.cdiv(f, columns))](
                gates, ups, out, gates.stride(0), ups.stride(0), F=f, COLUMNS=columns, num_warps=4
            )
    return out


def launch_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), both [..., F]."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    grads = as_rows(grad)
    gates = as_rows(gate)
    ups = as_rows(up)
    n, f = gates.shape
    columns = min(MAX_COLUMNS, triton.next_power_of_2(f))
    if dup.numel():
        with torch.cuda.device_of(gate):
            swiglu_backward_kernel[(n, triton.cdiv(f, columns))](
                grads, gates, ups, dgate, dup, grads.stride(0), gates.stride(0), ups.stride(0),
                F=f, COLUMNS=columns, num_warps=4,
            )  # fmt: skip
    return dgate, dup
