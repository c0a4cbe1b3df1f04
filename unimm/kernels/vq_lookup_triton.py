"""The nearest code in Triton: a running arg-max over tiles of the codebook, no [N, V] matrix."""
# triton reads the signatures of kernels; types here would be types of pointers, which have no names
# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CODES = 64, 64
CODEBOOK_SPLITS = 8  # parts of the codebook, so that the few hundred vectors of an image fill a GPU


@triton.jit(do_not_specialize=["n"])
def nearest_code_kernel(
    z_ptr, codebook_ptr, score_ptr, code_ptr, n, z_row, v, part,
    D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, part of the codebook): the best score there, and its code; of ties the first."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    z = tl.load(z_ptr + rows[:, None] * z_row + dims[None, :], mask=(rows < n)[:, None] & (dims < D)[None, :], other=0.0)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, v)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    code = tl.zeros([ROWS], tl.int32)
    for start in range(first, last, CODES):
        codes = start + tl.arange(0, CODES)
        inside = codes < last
        book = tl.load(codebook_ptr + codes[:, None] * D + dims[None, :], mask=inside[:, None] & (dims < D)[None, :], other=0.0)
        scores = tl.dot(z, tl.trans(book), input_precision="ieee")
        scores = tl.where(inside[None, :], scores, float("-inf"))
        top, index = tl.max(scores, 1, return_indices=True, return_indices_tie_break_left=True)
        # not >=: of ties the earlier tile holds the lower codes
        code = tl.where(top > best, start + index, code)
        best = tl.maximum(top, best)
    at = tl.program_id(1).to(tl.int64) * n + rows
    tl.store(score_ptr + at, best, mask=rows < n)
    tl.store(code_ptr + at, code, mask=rows < n)


def launch_nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """z [N, D] and codebook [V, D] of unit rows, float32 -> [N] int64."""
    z, codebook = z.contiguous(), codebook.contiguous()
    (n, d), v = z.shape, len(codebook)
    part = triton.cdiv(triton.cdiv(v, CODEBOOK_SPLITS), CODES) * CODES
    parts = triton.cdiv(v, part)
    scores = torch.empty(parts, n, dtype=torch.float32, device=z.device)
    codes = torch.empty(parts, n, dtype=torch.int32, device=z.device)
    if n:
        with torch.cuda.device_of(z):
            nearest_code_kernel[(triton.cdiv(n, ROWS), parts)](
                z, codebook, scores, codes, n, z.stride(0), v, part,
                # 16: the least depth of a matrix product in Triton
                D=d, DIMS=max(16, triton.next_power_of_2(d)), ROWS=ROWS, CODES=CODES, num_warps=4,
            )  # fmt: skip
    # of ties the first part, which holds the lower codes
    return codes.gather(0, scores.argmax(0)[None]).squeeze(0).long()
