"""The guided velocity in Triton: one launch per image where lengths are those of tokens, two where of the whole image.

The length of a whole image has to be known before its first number can be written: a first kernel writes sums of
squares, a second adds them up and computes the velocity again, from the cache.
"""

# triton reads the signatures of kernels; types here would be types of pointers, which have no names
# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
ENTRIES = 2048  # numbers of a tile of whole tokens


@triton.jit
def full_and_guided(full_ptr, no_text_ptr, no_image_ptr, at, n, text_scale, image_scale, HAS_NO_IMAGE: tl.constexpr):
    """A block of the full and of the guided velocity, not yet renormalized, in float32."""
    full = tl.load(full_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    no_text = tl.load(no_text_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    u = no_text + text_scale * (full - no_text)
    if HAS_NO_IMAGE:
        no_image = tl.load(no_image_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        u = no_image + image_scale * (u - no_image)
    return full, u


@triton.jit(do_not_specialize=["n"])
def sum_squares_kernel(
    full_ptr, no_text_ptr, no_image_ptr, sums_ptr, n, text_scale, image_scale,
    HAS_NO_IMAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of squares of the full and of the guided velocity over a block of numbers, to sums [2, blocks]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    full, u = full_and_guided(full_ptr, no_text_ptr, no_image_ptr, at, n, text_scale, image_scale, HAS_NO_IMAGE)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(full * full))
    tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(u * u))


@triton.jit(do_not_specialize=["n"])
def renormalize_kernel(
    full_ptr, no_text_ptr, no_image_ptr, sums_ptr, out_ptr, n, text_scale, image_scale, renorm_min,
    HAS_NO_IMAGE: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The guided velocity of a block, renormalized by the whole image's length. SUMS: blocks up to a power of 2."""
    blocks = tl.arange(0, SUMS)
    full = tl.sum(tl.load(sums_ptr + blocks, mask=blocks < tl.num_programs(0), other=0.0))
    guided = tl.sum(tl.load(sums_ptr + tl.num_programs(0) + blocks, mask=blocks < tl.num_programs(0), other=0.0))
    factor = tl.minimum(tl.maximum(tl.sqrt(full) / (tl.sqrt(guided) + 1e-8), renorm_min), 1.0)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, u = full_and_guided(full_ptr, no_text_ptr, no_image_ptr, at, n, text_scale, image_scale, HAS_NO_IMAGE)
    tl.store(out_ptr + at, (u * factor).to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["n"])
def renormalize_tokens_kernel(
    full_ptr, no_text_ptr, no_image_ptr, out_ptr, n, text_scale, image_scale, renorm_min,
    HAS_NO_IMAGE: tl.constexpr, AFTER_TEXT: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The guided velocity of a tile of tokens, each renormalized by its length: after the text's step or at the end."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < C)[None, :]
    at = rows[:, None] * C + columns[None, :]
    full = tl.load(full_ptr + at, mask=inside, other=0.0).to(tl.float32)
    no_text = tl.load(no_text_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = no_text + text_scale * (full - no_text)
    length = tl.sqrt(tl.sum(full * full, 1))
    if AFTER_TEXT:
        factor = tl.minimum(tl.maximum(length / (tl.sqrt(tl.sum(u * u, 1)) + 1e-8), renorm_min), 1.0)
        u = u * factor[:, None]
    if HAS_NO_IMAGE:
        no_image = tl.load(no_image_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u = no_image + image_scale * (u - no_image)
    if not AFTER_TEXT:
        factor = tl.minimum(tl.maximum(length / (tl.sqrt(tl.sum(u * u, 1)) + 1e-8), renorm_min), 1.0)
        u = u * factor[:, None]
    tl.store(out_ptr + at, u.to(out_ptr.dtype.element_ty), mask=inside)


def launch_cfg_combine(
    full: Tensor,
    no_text: Tensor,
    no_image: Tensor | None,
    text_scale: float,
    image_scale: float,
    renorm: str,
    renorm_min: float,
) -> Tensor:
    """full, no_text and no_image [L, C] -> [L, C]."""
    full = full.contiguous()
    no_text = no_text.contiguous()
    no_image = None if no_image is None else no_image.contiguous()
    out = torch.empty_like(full)
    if not full.numel():
        return out
    branches = (full, no_text, no_image)
    scales = (text_scale, image_scale)
    has_no_image = int(no_image is not None)
    with torch.cuda.device_of(full):
        if renorm == "global":
            blocks = triton.cdiv(full.numel(), BLOCK)
            sums = torch.empty(2, blocks, dtype=torch.float32, device=full.device)
            sum_squares_kernel[(blocks,)](
                *branches, sums, full.numel(), *scales, HAS_NO_IMAGE=has_no_image, BLOCK=BLOCK, num_warps=4
            )
            renormalize_kernel[(blocks,)](
                *branches, sums, out, full.numel(), *scales, renorm_min,
                HAS_NO_IMAGE=has_no_image, BLOCK=BLOCK, SUMS=triton.next_power_of_2(blocks), num_warps=4,
            )  # fmt: skip
            return out
        n, c = full.shape
        columns = triton.next_power_of_2(c)
        rows = max(1, ENTRIES // columns)
        renormalize_tokens_kernel[(triton.cdiv(n, rows),)](
            *branches, out, n, *scales, renorm_min,
            HAS_NO_IMAGE=has_no_image, AFTER_TEXT=int(renorm == "text_channel"), C=c, ROWS=rows, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return out
