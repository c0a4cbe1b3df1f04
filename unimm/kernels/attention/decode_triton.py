"""Attention of one query row per sample over a long cache, in Triton: keys are split between programs, then merged.

Axes: B samples, M key rows, H query heads, G key/value heads, K head. One program per sample and head is too few to
fill a GPU, so each sample's keys are cut into equal parts; the heads of a group share the keys they load, as rows of
one matrix product.
"""
# triton reads the signatures of kernels; types here would be types of pointers, which have no names
# mypy: disable-error-code="no-untyped-def"
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimm.kernels.attention.attention_triton import LN2, LOG2E, load_rows, padded_head_dim
from unimm.kernels.attention.tile_configs import DECODE_LOOPS
from unimm.kernels.common import contiguous_heads

# the smallest number of rows of a matrix instruction: a smaller group is padded
MIN_ROWS = 16
# enough that one computes while another waits for memory
PROGRAMS_PER_PROCESSOR = 2
# the merge holds one number per part and head dimension in registers
MAX_PARTS = 64
# on a CPU, in the interpreter: enough to test the merge
INTERPRETED_PARTS = 3


@triton.jit
def part_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, starts_ptr, lengths_ptr,
    q_sample, q_head, k_row, k_head, v_row, v_head, n_parts, group, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):
    """Program (b, g, i): part i of the keys of sample b, key head g; output [B, G, parts, ROWS, K] and lse, float32."""
    sample, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    length = tl.load(lengths_ptr + sample)
    share = tl.cdiv(tl.cdiv(length, n_parts), STEP) * STEP
    first = part * share
    last = tl.minimum(first + share, length)
    start = tl.load(starts_ptr + sample).to(tl.int64)
    k_ptr += start * k_row + key_head * k_head
    v_ptr += start * v_row + key_head * v_head
    q_ptr += sample * q_sample + key_head * group * q_head
    heads = tl.arange(0, ROWS)
    q = load_rows(q_ptr, heads, q_head, group, HEAD, WIDTH, True)
    scale2 = scale * LOG2E
    o = tl.zeros([ROWS, WIDTH], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for at in tl.range(first, last, STEP, num_stages=STAGES):
        keys = at + tl.arange(0, STEP)
        k = load_rows(k_ptr, keys, k_row, last, HEAD, WIDTH, True)
        v = load_rows(v_ptr, keys, v_row, last, HEAD, WIDTH, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where((keys < last)[None, :], scores, float("-inf"))
        # a step holds at least one key: the maximum is finite
        new_top = tl.maximum(top, tl.max(scores, 1) * scale2)
        p = tl.exp2(scores * scale2 - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")
        top = new_top
    # of a part without keys o is 0 and top is -inf: dividing by 1 keeps both
    total = tl.where(total > 0.0, total, 1.0)
    dims = tl.arange(0, WIDTH)
    at = ((sample * tl.num_programs(1) + key_head) * n_parts + part) * ROWS + heads
    tl.store(part_ptr + at[:, None] * WIDTH + dims[None, :], o / total[:, None])
    tl.store(part_lse_ptr + at, (top + tl.log2(total)) * LN2)


@triton.jit
def merge_kernel(
    part_ptr, part_lse_ptr, o_ptr, n_parts, group,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):
    """Program (b, h): the parts of one head, weighted by exp(lse); 0 where no part has keys."""
    sample, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n_heads = tl.num_programs(1)
    parts, dims = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    key_head = sample * (n_heads // group) + head // group
    at = (key_head * n_parts + parts) * ROWS + head % group
    lse = tl.load(part_lse_ptr + at, mask=parts < n_parts, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2((lse - tl.where(top == float("-inf"), 0.0, top)) * LOG2E)
    total = tl.sum(weights, 0)
    o = tl.load(part_ptr + at[:, None] * WIDTH + dims[None, :], mask=(parts < n_parts)[:, None], other=0.0)
    o = tl.sum(o * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(o_ptr + (sample * n_heads + head) * HEAD + dims, o.to(o_ptr.dtype.element_ty), mask=dims < HEAD)


@lru_cache
def _processor_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _part_count(device: torch.device, programs: int, longest: int, step: int) -> int:
    """The parts that make enough programs of `programs` (samples x key heads); from shapes alone, without a sync."""
    if device.type != "cuda":
        return INTERPRETED_PARTS
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * _processor_count(device), programs)
    return max(1, min(wanted, MAX_PARTS, triton.cdiv(longest, step)))


def launch_decode(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, scale: float | None = None) -> Tensor:
    """One query row per sample: q [B, H, K], k and v [M, G, K] packed -> o [B, H, K] dense, in q's dtype.

    starts, lengths [B] int32: sample b attends to the key rows starts[b] .. starts[b] + lengths[b]; where there are
    none, o = 0. scale (> 0) is K ** -0.5 unless given.
    """
    (b, h, head), (m, g, _) = q.shape, k.shape
    q, k, v = contiguous_heads(q), contiguous_heads(k), contiguous_heads(v)
    o = torch.empty(b, h, head, dtype=q.dtype, device=q.device)
    if not o.numel():
        return o
    loop = DECODE_LOOPS[q.element_size()]
    rows = max(MIN_ROWS, triton.next_power_of_2(h // g))
    n_parts = _part_count(q.device, b * g, m, loop.step)
    part = torch.empty(b, g, n_parts, rows, padded_head_dim(head), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(b, g, n_parts, rows, dtype=torch.float32, device=q.device)
    shape = dict(HEAD=head, WIDTH=padded_head_dim(head), ROWS=rows)
    with torch.cuda.device_of(q):
        part_kernel[b, g, n_parts](
            q, k, v, part, part_lse, starts, lengths,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], n_parts, h // g, scale or head**-0.5,
            **shape, STEP=loop.step, STAGES=loop.stages, num_warps=loop.warps, num_stages=loop.stages,
        )  # fmt: skip
        merge_kernel[b, h](part, part_lse, o, n_parts, h // g, **shape, PARTS=triton.next_power_of_2(n_parts))
    return o
