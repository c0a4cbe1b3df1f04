"""Attention under key ranges in Triton: forward, backward, and their launchers.

Axes as in attention.py: N query rows, M key rows, H query heads, G key/value heads, K head.

Work is cut into tiles of `rows` x `keys`. The schedule (`TileRuns`) lists, for a block of one axis, the runs of consecutive
tiles of the other axis that are fully visible, computed with no mask and no bounds check, and those partly visible,
where the key ranges make the mask. Empty tiles are never visited. Runs, not a list of tiles: an address that depends
on a load in the same iteration keeps the compiler from fetching more than one tile ahead.

    kernel    a program owns                  and walks over            writes
    forward   `rows` rows of a query head     keys they see             o, lse
    dq        the same                        the same                  dq, delta
    dkv       `keys` keys of a key head       rows that see them, for   dk, dv
                                              each head of the group

No program adds to what another writes, so results repeat bit for bit.

Softmax runs in base 2 with the scale folded in, in float32 like all sums; products take the input's dtype. Heads whose
width is no power of two are padded to WIDTH with zeros on load. Addresses are 64 bits wide: a packed cache may hold
more than 2^31 numbers.
"""
# triton reads the signatures of kernels; types here would be types of pointers, which have no names
# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from unimm.kernels.attention.tile_configs import TileConfig
from unimm.kernels.attention.tile_schedule import TileRuns
from unimm.kernels.common import contiguous_heads

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# the smallest inner dimension of a matrix instruction
MIN_WIDTH = 16

# ---- what the kernels share


@triton.jit
def load_rows(ptr, rows, row_stride, end, HEAD: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows of one head, [rows, WIDTH]: zeros past the head's width, and from row `end` on where BOUNDED."""
    dims = tl.arange(0, WIDTH)
    at = ptr + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]
    if BOUNDED and HEAD < WIDTH:
        tile = tl.load(at, mask=(rows < end)[:, None] & (dims < HEAD)[None, :], other=0.0)
    elif BOUNDED:
        tile = tl.load(at, mask=(rows < end)[:, None], other=0.0)
    elif HEAD < WIDTH:
        tile = tl.load(at, mask=(dims < HEAD)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_rows(ptr, tile, rows, row_stride, end, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Write rows of one head, [rows, WIDTH], in the dtype of `ptr`, but for those past the width or row `end`."""
    dims = tl.arange(0, WIDTH)
    at = ptr + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(rows < end)[:, None] & (dims < HEAD)[None, :])


@triton.jit
def _visible_pairs(ranges_ptr, rows, keys, n_keys, RANGES: tl.constexpr):
    """Whether each row attends to each key; rows and keys broadcast against each other, [r, 1] and [1, k] or the reverse.

    A key from n_keys on has no range, and no range holds a row from N on: tiles past the end need no other mask.
    """
    inside = keys < n_keys
    first = tl.load(ranges_ptr + keys, mask=inside, other=0)
    last = tl.load(ranges_ptr + n_keys + keys, mask=inside, other=0)
    visible = (rows >= first) & (rows < last)
    if RANGES == 2:
        first = tl.load(ranges_ptr + 2 * n_keys + keys, mask=inside, other=0)
        last = tl.load(ranges_ptr + 3 * n_keys + keys, mask=inside, other=0)
        visible = visible | ((rows >= first) & (rows < last))
    return visible


# ---- forward


@triton.jit
def _forward_runs(
    o, top, total, q, k_ptr, v_ptr, ranges_ptr, index_ptr, runs_ptr, rows, k_row, v_row, n_keys, scale2,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, RANGES: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr,
):
    """Online softmax over the runs of one block: o [rows, WIDTH] not yet divided, top and total [rows] in base 2."""
    block = tl.program_id(0)
    for run in range(tl.load(index_ptr + block), tl.load(index_ptr + block + 1)):
        start = tl.load(runs_ptr + 2 * run) * (KEYS // STEP)
        end = tl.load(runs_ptr + 2 * run + 1) * (KEYS // STEP)
        for step in tl.range(start, end, num_stages=STAGES):
            keys = step * STEP + tl.arange(0, STEP)
            k = load_rows(k_ptr, keys, k_row, n_keys, HEAD, WIDTH, MASKED)
            v = load_rows(v_ptr, keys, v_row, n_keys, HEAD, WIDTH, MASKED)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if MASKED:
                visible = _visible_pairs(ranges_ptr, rows[:, None], keys[None, :], n_keys, RANGES)
                scores = tl.where(visible, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1) * scale2)
            # for a row without a visible key so far, -inf - -inf would be nan
            shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
            p = tl.exp2(scores * scale2 - shift[:, None])
            rescale = tl.exp2(top - shift)
            total = total * rescale + tl.sum(p, 1)
            o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")
            top = new_top
    return o, top, total


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, ranges_ptr, full_index, full_runs, part_index, part_runs,
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head, n_rows, n_keys, group, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
    RANGES: tl.constexpr, STAGES: tl.constexpr,
):
    """Program (i, h): rows of block i, query head h."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    q = load_rows(q_ptr + head * q_head, rows, q_row, n_rows, HEAD, WIDTH, True)
    k_ptr += head // group * k_head
    v_ptr += head // group * v_head
    scale2 = scale * LOG2E
    o = tl.zeros([ROWS, WIDTH], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o, top, total = _forward_runs(
        o, top, total, q, k_ptr, v_ptr, ranges_ptr, full_index, full_runs, rows, k_row, v_row, n_keys, scale2,
        HEAD, WIDTH, KEYS, STEP, RANGES, STAGES, MASKED=False,
    )
    o, top, total = _forward_runs(
        o, top, total, q, k_ptr, v_ptr, ranges_ptr, part_index, part_runs, rows, k_row, v_row, n_keys, scale2,
        HEAD, WIDTH, KEYS, STEP, RANGES, STAGES, MASKED=True,
    )
    # for a row that attends to nothing o is 0 and top is -inf: dividing by 1 keeps both
    total = tl.where(total > 0.0, total, 1.0)
    store_rows(o_ptr + head * o_head, o / total[:, None], rows, o_row, n_rows, HEAD, WIDTH)
    tl.store(lse_ptr + head * n_rows + rows, (top + tl.log2(total)) * LN2, mask=rows < n_rows)


# ---- backward
# p = exp(s - lse), delta = sum(o * do), ds = p * (dp - delta): FlashAttention-2, algorithm 2 (arXiv 2307.08691)


@triton.jit
def _dq_runs(
    dq, q, do, lse2, delta, k_ptr, v_ptr, ranges_ptr, index_ptr, runs_ptr, rows, k_row, v_row, n_keys, scale2,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, RANGES: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr,
):
    """dq [rows, WIDTH] over the runs of one block, not yet scaled."""
    block = tl.program_id(0)
    for run in range(tl.load(index_ptr + block), tl.load(index_ptr + block + 1)):
        start = tl.load(runs_ptr + 2 * run) * (KEYS // STEP)
        end = tl.load(runs_ptr + 2 * run + 1) * (KEYS // STEP)
        for step in tl.range(start, end, num_stages=STAGES):
            keys = step * STEP + tl.arange(0, STEP)
            k = load_rows(k_ptr, keys, k_row, n_keys, HEAD, WIDTH, MASKED)
            v = load_rows(v_ptr, keys, v_row, n_keys, HEAD, WIDTH, MASKED)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - lse2[:, None])
            if MASKED:
                # also removes the infinities of rows that attend to nothing
                p = tl.where(_visible_pairs(ranges_ptr, rows[:, None], keys[None, :], n_keys, RANGES), p, 0.0)
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, ranges_ptr, full_index, full_runs, part_index, part_runs,
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head, do_row, do_head, n_rows, n_keys, n_heads, group, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
    RANGES: tl.constexpr, STAGES: tl.constexpr,
):
    """Program (i, h): rows of block i, query head h; also writes delta, which the dkv kernel reads."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    do = load_rows(do_ptr + head * do_head, rows, do_row, n_rows, HEAD, WIDTH, True)
    o = load_rows(o_ptr + head * o_head, rows, o_row, n_rows, HEAD, WIDTH, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + head * n_rows + rows, delta, mask=rows < n_rows)
    q = load_rows(q_ptr + head * q_head, rows, q_row, n_rows, HEAD, WIDTH, True)
    lse2 = tl.load(lse_ptr + head * n_rows + rows, mask=rows < n_rows, other=0.0) * LOG2E
    k_ptr += head // group * k_head
    v_ptr += head // group * v_head
    scale2 = scale * LOG2E
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    dq = _dq_runs(
        dq, q, do, lse2, delta, k_ptr, v_ptr, ranges_ptr, full_index, full_runs, rows, k_row, v_row, n_keys, scale2,
        HEAD, WIDTH, KEYS, STEP, RANGES, STAGES, MASKED=False,
    )
    dq = _dq_runs(
        dq, q, do, lse2, delta, k_ptr, v_ptr, ranges_ptr, part_index, part_runs, rows, k_row, v_row, n_keys, scale2,
        HEAD, WIDTH, KEYS, STEP, RANGES, STAGES, MASKED=True,
    )
    # dq is dense [N, H, K]: the launcher allocates it
    store_rows(dq_ptr + head * HEAD, dq * scale, rows, n_heads * HEAD, n_rows, HEAD, WIDTH)


@triton.jit
def _dkv_runs(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, ranges_ptr, index_ptr, runs_ptr, keys, q_row, do_row, n_rows, n_keys,
    scale2, HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, RANGES: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr,
):
    """dk (not yet scaled) and dv [keys, WIDTH] over the runs of one block, one query head.

    Scores are held as [keys, rows]: p and ds then enter their products from registers, as they were computed.
    """
    block = tl.program_id(0)
    for run in range(tl.load(index_ptr + block), tl.load(index_ptr + block + 1)):
        start = tl.load(runs_ptr + 2 * run) * (ROWS // STEP)
        end = tl.load(runs_ptr + 2 * run + 1) * (ROWS // STEP)
        for step in tl.range(start, end, num_stages=STAGES):
            rows = step * STEP + tl.arange(0, STEP)
            q = load_rows(q_ptr, rows, q_row, n_rows, HEAD, WIDTH, MASKED)
            do = load_rows(do_ptr, rows, do_row, n_rows, HEAD, WIDTH, MASKED)
            if MASKED:
                lse2 = tl.load(lse_ptr + rows, mask=rows < n_rows, other=0.0) * LOG2E
                delta = tl.load(delta_ptr + rows, mask=rows < n_rows, other=0.0)
            else:
                lse2 = tl.load(lse_ptr + rows) * LOG2E
                delta = tl.load(delta_ptr + rows)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse2[None, :])
            if MASKED:
                p = tl.where(_visible_pairs(ranges_ptr, rows[None, :], keys[:, None], n_keys, RANGES), p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, ranges_ptr, full_index, full_runs, part_index, part_runs,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, n_rows, n_keys, n_key_heads, group, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
    RANGES: tl.constexpr, STAGES: tl.constexpr,
):
    """Program (j, g): keys of block j, key head g; the query heads of the group one after the other."""
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    key_head = tl.program_id(1).to(tl.int64)
    k = load_rows(k_ptr + key_head * k_head, keys, k_row, n_keys, HEAD, WIDTH, True)
    v = load_rows(v_ptr + key_head * v_head, keys, v_row, n_keys, HEAD, WIDTH, True)
    scale2 = scale * LOG2E
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    for member in range(group):
        head = key_head * group + member
        q_at = q_ptr + head * q_head
        do_at = do_ptr + head * do_head
        lse_at = lse_ptr + head * n_rows
        delta_at = delta_ptr + head * n_rows
        dk, dv = _dkv_runs(
            dk, dv, k, v, q_at, do_at, lse_at, delta_at, ranges_ptr, full_index, full_runs, keys, q_row, do_row, n_rows, n_keys,
            scale2, HEAD, WIDTH, ROWS, STEP, RANGES, STAGES, MASKED=False,
        )
        dk, dv = _dkv_runs(
            dk, dv, k, v, q_at, do_at, lse_at, delta_at, ranges_ptr, part_index, part_runs, keys, q_row, do_row, n_rows, n_keys,
            scale2, HEAD, WIDTH, ROWS, STEP, RANGES, STAGES, MASKED=True,
        )
    store_rows(dk_ptr + key_head * HEAD, dk * scale, keys, n_key_heads * HEAD, n_keys, HEAD, WIDTH)
    store_rows(dv_ptr + key_head * HEAD, dv, keys, n_key_heads * HEAD, n_keys, HEAD, WIDTH)


# ---- launchers


def padded_head_dim(head_dim: int) -> int:
    """The width of a head in a tile: a power of two, at least what a matrix instruction needs."""
    return max(MIN_WIDTH, triton.next_power_of_2(head_dim))


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, runs: TileRuns, config: TileConfig, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """q [N, H, K], k and v [M, G, K] -> o [N, H, K] dense, in q's dtype, and lse [H, N] float32, the natural logarithm.

    ranges [R, 2, M] int32 with R = 1 or 2: rows ranges[r, 0, c] <= n < ranges[r, 1, c] attend to key c, for any r.
    runs: the key tiles of each block of rows, for tiles of config.rows x config.keys. scale (> 0) is K ** -0.5 unless
    given. A row that attends to nothing gets o = 0 and lse = -inf. Rows of k and v outside every range must be finite.
    """
    (n, h, head), (m, g, _) = q.shape, k.shape
    q, k, v = contiguous_heads(q), contiguous_heads(k), contiguous_heads(v)
    o = torch.empty(n, h, head, dtype=q.dtype, device=q.device)
    lse = torch.empty(h, n, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return o, lse
    loop = config.forward
    with torch.cuda.device_of(q):
        forward_kernel[triton.cdiv(n, config.rows), h](
            q, k, v, o, lse, ranges, runs.full_ptr, runs.full, runs.partial_ptr, runs.partial,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *o.stride()[:2], n, m, h // g, scale or head**-0.5,
            HEAD=head, WIDTH=padded_head_dim(head), ROWS=config.rows, KEYS=config.keys, STEP=loop.step, RANGES=len(ranges),
            STAGES=loop.stages, num_warps=loop.warps, num_stages=loop.stages,
        )  # fmt: skip
    return o, lse


def launch_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, ranges: Tensor,
    by_row: TileRuns, by_key: TileRuns, config: TileConfig, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From do [N, H, K], the gradient of o: dq [N, H, K], dk and dv [M, G, K], dense, in the dtypes of q, k, v.

    by_row: the key tiles of each block of rows, as in forward; by_key: the row tiles of each block of keys.
    """
    (n, h, head), (m, g, _) = q.shape, k.shape
    do, q, k, v, o = (contiguous_heads(x) for x in (do, q, k, v, o))
    dq = torch.empty(n, h, head, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(m, g, head, dtype=x.dtype, device=x.device) for x in (k, v))
    delta = torch.empty(h, n, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    scale = scale or head**-0.5
    shape = dict(HEAD=head, WIDTH=padded_head_dim(head), ROWS=config.rows, KEYS=config.keys, RANGES=len(ranges))
    with torch.cuda.device_of(q):
        if dq.numel():
            loop = config.dq
            dq_kernel[triton.cdiv(n, config.rows), h](
                q, k, v, o, do, lse, delta, dq, ranges, by_row.full_ptr, by_row.full, by_row.partial_ptr, by_row.partial,
                *strides, *o.stride()[:2], *do.stride()[:2], n, m, h, h // g, scale,
                **shape, STEP=loop.step, STAGES=loop.stages, num_warps=loop.warps, num_stages=loop.stages,
            )  # fmt: skip
        if dk.numel():
            loop = config.dkv
            dkv_kernel[triton.cdiv(m, config.keys), g](
                q, k, v, do, lse, delta, dk, dv, ranges, by_key.full_ptr, by_key.full, by_key.partial_ptr, by_key.partial,
                *strides, *do.stride()[:2], n, m, g, h // g, scale,
                **shape, STEP=loop.step, STAGES=loop.stages, num_warps=loop.warps, num_stages=loop.stages,
            )  # fmt: skip
    return dq, dk, dv
