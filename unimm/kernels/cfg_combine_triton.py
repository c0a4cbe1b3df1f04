"""The guided velocity in Triton: one launch a picture where lengths are those of tokens, two where of the whole picture.

The length of a whole picture has to be known before its first number can be written: a first kernel leaves sums of
squares, a second adds them up and makes the velocity again, from the cache.
"""
# triton reads the signatures of kernels; types here would be types of pointers, which have no names
# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
ENTRIES = 2048  # of a tile of whole tokens


@triton.jit
def plain_and_guided(v_ptr, text_ptr, image_ptr, at, n, text_scale, image_scale, IMAGE: tl.constexpr):
    """A block of the plain and of the guided velocity, not yet shrunk, in float32."""
    v = tl.load(v_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    text = tl.load(text_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    u = text + text_scale * (v - text)
    if IMAGE:
        image = tl.load(image_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        u = image + image_scale * (u - image)
    return v, u


@triton.jit(do_not_specialize=["n"])
def squares_kernel(v_ptr, text_ptr, image_ptr, sums_ptr, n, text_scale, image_scale, IMAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of squares of the plain and of the guided velocity over a block of numbers, to sums [2, blocks]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v, u = plain_and_guided(v_ptr, text_ptr, image_ptr, at, n, text_scale, image_scale, IMAGE)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(v * v))
    tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(u * u))


@triton.jit(do_not_specialize=["n"])
def shrink_kernel(
    v_ptr, text_ptr, image_ptr, sums_ptr, out_ptr, n, text_scale, image_scale, least,
    IMAGE: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The guided velocity of a block, shrunk to the whole picture's plain length. SUMS: blocks up to a power of 2."""
    blocks = tl.arange(0, SUMS)
    plain = tl.sum(tl.load(sums_ptr + blocks, mask=blocks < tl.num_programs(0), other=0.0))
    guided = tl.sum(tl.load(sums_ptr + tl.num_programs(0) + blocks, mask=blocks < tl.num_programs(0), other=0.0))
    factor = tl.minimum(tl.maximum(tl.sqrt(plain) / (tl.sqrt(guided) + 1e-8), least), 1.0)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, u = plain_and_guided(v_ptr, text_ptr, image_ptr, at, n, text_scale, image_scale, IMAGE)
    tl.store(out_ptr + at, (u * factor).to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["n"])
def shrink_tokens_kernel(
    v_ptr, text_ptr, image_ptr, out_ptr, n, text_scale, image_scale, least,
    IMAGE: tl.constexpr, AFTER_TEXT: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The guided velocity of a tile of tokens, each shrunk to its plain length: after the text's part or at the end."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < C)[None, :]
    at = rows[:, None] * C + columns[None, :]
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
    text = tl.load(text_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = text + text_scale * (v - text)
    length = tl.sqrt(tl.sum(v * v, 1))
    if AFTER_TEXT:
        factor = tl.minimum(tl.maximum(length / (tl.sqrt(tl.sum(u * u, 1)) + 1e-8), least), 1.0)
        u = u * factor[:, None]
    if IMAGE:
        image = tl.load(image_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u = image + image_scale * (u - image)
    if not AFTER_TEXT:
        factor = tl.minimum(tl.maximum(length / (tl.sqrt(tl.sum(u * u, 1)) + 1e-8), least), 1.0)
        u = u * factor[:, None]
    tl.store(out_ptr + at, u.to(out_ptr.dtype.element_ty), mask=inside)


def launch_cfg_combine(
    v: Tensor, text: Tensor, image: Tensor | None, text_scale: float, image_scale: float, renorm: str, least: float
) -> Tensor:
    """v, text and image [L, C] -> [L, C]."""
    v, text = v.contiguous(), text.contiguous()
    image = None if image is None else image.contiguous()
    out = torch.empty_like(v)
    if not v.numel():
        return out
    scales, has_image = (text_scale, image_scale), int(image is not None)
    with torch.cuda.device_of(v):
        if renorm == "global":
            blocks = triton.cdiv(v.numel(), BLOCK)
            sums = torch.empty(2, blocks, dtype=torch.float32, device=v.device)
            squares_kernel[(blocks,)](v, text, image, sums, v.numel(), *scales, IMAGE=has_image, BLOCK=BLOCK, num_warps=4)
            shrink_kernel[(blocks,)](
                v, text, image, sums, out, v.numel(), *scales, least,
                IMAGE=has_image, BLOCK=BLOCK, SUMS=triton.next_power_of_2(blocks), num_warps=4,
            )  # fmt: skip
            return out
        n, c = v.shape
        columns = triton.next_power_of_2(c)
        rows = max(1, ENTRIES // columns)
        shrink_tokens_kernel[(triton.cdiv(n, rows),)](
            v, text, image, out, n, *scales, least,
            IMAGE=has_image, AFTER_TEXT=int(renorm == "text_channel"), C=c, ROWS=rows, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return out
