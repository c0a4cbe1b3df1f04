"""Attention over packed sequences under one mask: one call for training, prefill, decoding and denoising.

Axes: N query rows, M key rows, H query heads, G key/value heads (H a multiple of G), K head; B samples of n query and m
key rows in a padded call, r query heads of a key head.
"""

import warnings
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import scaled_dot_product_attention

from unimm.kernels.attention.mask import AttentionMask, SDPACall, TileRuns
from unimm.kernels.common import autocast_tensors
from unimm.kernels.dispatch import constant_in_graphs, device_type, planned_device, resolve_backend

if TYPE_CHECKING:
    from unimm.kernels.attention.tile_configs import TileConfig


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, by_sample: bool = False, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(K) under `mask`) v, grouped-query: q [N, H, K], k and v [M, G, K] -> [N, H, K].

    Packed: the samples of `mask` lie end to end in q, and at its `key_starts` in k and v, which may be longer. A row
    that attends to nothing gets 0. Raises ValueError where the shapes disagree with each other or with the mask.
    In a compiled graph, call `plan_attention(mask, q)` before it. by_sample: in PyTorch's calls on a CPU, without
    gradients, a sample is equal to the bit to itself alone, as it always is in half precision. dropout: the share of
    attention's probabilities that are set to 0, the others being scaled up; by PyTorch's calls on every device.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:  # a graph that reads the lengths of a mask would be compiled again for every mask
        _check_shapes(q, k, v, mask)
    q, k, v = autocast_tensors(q, k, v)
    n_keys = mask.ranges.shape[2] if compiling else mask.n_keys
    k = k[:n_keys]
    v = v[:n_keys]
    # planned for a GPU, where a fused call drops: PyTorch's on a CPU would count all probabilities
    if dropout and planned_device() != "cuda":
        return _attention_with_dropout(q, k, v, mask, dropout)
    backend = resolve_backend("attention", q, k, v)
    if backend == "reference":
        return attention_reference(q, k, v, mask)
    if backend == "flex":
        return _attention_flex(q, k, v, mask)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if backend == "triton" and mask.decode_ranges and not needs_grad:
        return _decode_op(q, k, v, *mask.decode_ranges)
    if backend == "triton" or compiling:
        return _attention_via_op(q, k, v, mask, backend)
    # eager code calls PyTorch directly, where fused calls know whether a gradient is needed: 2.7 ms forward and 13.4
    # with backward against 11 and 28 through the op (40 samples of 50 rows, 4 heads of 64, bf16, one thread)
    return _attention_eager(q, k, v, mask, by_sample=can_call_by_sample(q, k, v) and (by_sample or is_half(q)))


def can_call_by_sample(*tensors: Tensor) -> bool:
    """Whether PyTorch's attention may be called for each sample by itself: on a CPU, without gradients, uncompiled.

    What a call rounds depends on its padding and on the thread that a sample falls to. In half precision such a
    difference is a last bit that a model makes grow: BAGEL's images moved by up to 12 of 255 with their neighbours.
    """
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return device_type(tensors[0]) == "cpu" and not needs_grad and not torch.compiler.is_compiling()


def is_half(x: Tensor) -> bool:
    """Whether numbers have fewer bits than float32's."""
    return x.dtype.itemsize < torch.float32.itemsize


def _attention_via_op(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, backend: str) -> Tensor:
    by_row: list[Tensor] = []
    by_key: list[Tensor] = []
    if backend == "triton":
        by_row, by_key = (list(runs) for runs in mask.schedule(*_tile_shape(q.device, q.shape[2], q.dtype))[:2])
    return _attention_op(q, k, v, mask.ranges, mask.table, by_row, by_key, backend)[0]


def plan_attention(mask: AttentionMask, q: Tensor) -> AttentionMask:
    """Compute now everything of a mask that `attention` needs inside a compiled graph, for queries like q [N, H, K]."""
    if resolve_backend("attention", q) != "triton":
        return mask.precompute()
    return mask.precompute(*_tile_shape(q.device, q.shape[2], q.dtype))


def _tile_config(device: torch.device, head_dim: int, dtype: torch.dtype) -> "TileConfig":
    """The configuration of the Triton kernels."""
    from unimm.kernels.attention.tile_configs import architecture, pick_tile_config

    # tracing, or planning, for a GPU that is not here: any tiles do
    fake = planned_device() == "cuda" or (device.type == "cuda" and not torch.cuda.is_available())
    return pick_tile_config("sm_90" if fake else architecture(device), head_dim, dtype)


@constant_in_graphs
def _tile_shape(device: torch.device, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and keys of a tile; a compiled graph holds them as constants."""
    config = _tile_config(device, head_dim, dtype)
    return config.rows, config.keys


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> None:
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention needs q [N, H, K], k = v [M, G, K], H % G == 0; got {[tuple(t.shape) for t in (q, k, v)]}"
        )
    if q.shape[0] != mask.n_queries:
        raise ValueError(f"attention got {q.shape[0]} query rows, the mask describes {mask.n_queries}")
    if k.shape[0] < mask.n_keys:
        raise ValueError(f"attention got {k.shape[0]} key rows, the mask describes {mask.n_keys}")
    if q.device.type != mask.device.type:
        raise ValueError(
            f"attention got q on {q.device}, a mask on {mask.device}: expected one device; use mask.to(q.device)"
        )


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """The definition, in plain operations, with a dense mask. Keys and values that no row attends to must be finite."""
    k, v = (repeat(t, "m g k -> m (g r) k", r=q.shape[1] // k.shape[1]) for t in (k, v))
    scores = torch.einsum("nhk, mhk -> hnm", q, k) * q.shape[2] ** -0.5
    attn_mask = mask.dense(k.shape[0])
    # the softmax of no score is nan: a row that attends to nothing gets all scores, and zeros afterwards
    attends = attn_mask.any(-1, keepdim=True)
    p = scores.masked_fill(~attn_mask & attends, float("-inf")).softmax(-1).masked_fill(~attends, 0.0)
    return torch.einsum("hnm, mhk -> nhk", p, v)


# ---- eager, with PyTorch's fused attention and its gradients


def _attention_eager(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, by_sample: bool) -> Tensor:
    if not mask.samples:
        return _attention_by_chunk(q, k, v, mask)
    if mask.uniform_decode and not by_sample:
        return _attention_strided(q, k, v, *mask.uniform_decode)
    if mask.use_padding and not by_sample:
        return _attention_padded(q, k, v, mask)
    # by range, keys behind a range's rows are not looked at
    return _attention_by_chunk(q, k, v, mask) if mask.sees_ahead else _attention_by_range(q, k, v, mask)


def _attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float) -> Tensor:
    """No sample is padded: what is dropped of one does not depend on the lengths of the others."""
    # grouped heads would take PyTorch's calls in float32 off their fast path on a GPU
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    by_range = mask.samples and not mask.sees_ahead
    return (_attention_by_range if by_range else _attention_by_chunk)(q, k, v, mask, dropout=dropout)


def _attention_padded(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Samples of similar lengths padded to one length: a call per bucket."""
    calls, result_rows = mask.padded_calls
    parts = []
    for q_rows, k_rows, attn_mask in calls:
        assert attn_mask is not None  # there is padding
        b = len(q_rows)
        q_pad = rearrange(q.index_select(0, q_rows.flatten()), "(b n) h k -> b h n k", b=b)
        k_pad, v_pad = (rearrange(t.index_select(0, k_rows.flatten()), "(b m) g k -> b g m k", b=b) for t in (k, v))
        # the fused backward is slow here: 15.4 ms against 2.3 written out, forward and backward, 40 samples of 64 rows
        slow = q.requires_grad and q.dtype == torch.bfloat16 and device_type(q) == "cpu"
        y = (_unfused_attention if slow else _sdpa)(q_pad, k_pad, v_pad, attn_mask[:, None])
        parts.append(rearrange(y, "b h n k -> (b n) h k"))
    return torch.cat(parts).index_select(0, result_rows)


def _attention_strided(q: Tensor, k: Tensor, v: Tensor, start: int, step: int, n: int) -> Tensor:
    """Decoding with caches of one length, q [B, H, K]: one call on strided views of the keys, without a gather."""
    k, v = (rearrange(t[start:].unfold(0, n, step), "b g k m -> b g m k") for t in (k, v))
    return rearrange(_sdpa(rearrange(q, "b h k -> b h 1 k"), k, v, None), "b h 1 k -> b h k")


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, *, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal=causal, enable_gqa=grouped)


def _unfused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    """q [B, H, n, K], k and v [B, G, m, K], attn_mask [B, 1, n, m] -> [B, H, n, K]; softmax in float32."""
    g = k.shape[1]
    n = q.shape[2]
    scores = rearrange(q, "b (g r) n k -> b g (r n) k", g=g) @ rearrange(k, "b g m k -> b g k m") * q.shape[3] ** -0.5
    scores = rearrange(scores.float(), "b g (r n) m -> b (g r) n m", n=n).masked_fill(~attn_mask, float("-inf"))
    p = rearrange(scores.softmax(-1).to(v.dtype), "b (g r) n m -> b g (r n) m", g=g)
    return rearrange(p @ v, "b g (r n) k -> b (g r) n k", n=n)


def _attention_by_range(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, dropout: float = 0.0) -> Tensor:
    """One call for each range of queries over just the keys it attends to: no masked-out work, no dense mask."""
    parts = []
    for i, key_ranges in enumerate(mask.samples):
        key_at = mask.key_starts[i]
        row = 0
        visible: list[tuple[int, int]] = []
        cached = mask.key_lengths[i] - mask.query_lengths[i]
        for key_range in key_ranges:
            keys = [*visible, (row, row + key_range.length)]
            if key_range.visible:
                visible = keys
            row += key_range.length
            n = min(key_range.length, row - cached)  # rows of this range that are queries
            if n > 0:
                at = mask.query_starts[i] + row - cached - n
                seen_k, seen_v = (_gather_spans(t, key_at, keys) for t in (k, v))
                causal = not key_range.full
                parts.append(_attend_last_rows(q[at : at + n], seen_k, seen_v, causal=causal, dropout=dropout))
    return torch.cat(parts) if parts else torch.zeros_like(q)


def _attend_last_rows(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, dropout: float) -> Tensor:
    """Attention of n queries that are the last n of m keys."""
    n = q.shape[0]
    m = k.shape[0]
    # where every row is a query, is_causal suffices: a mask would take SDPA off its fast path
    square = causal and n == m
    attn_mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n) if causal and 1 < n < m else None
    # not einops, which takes a third of such a call where samples decode one row each
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return _sdpa(q, k, v, attn_mask, causal=square, dropout=dropout)[0].transpose(0, 1)


def _gather_spans(x: Tensor, start: int, spans: list[tuple[int, int]]) -> Tensor:
    """The rows of several spans; a view, not a copy, where they touch."""
    joined = [list(spans[0])]
    for a, b in spans[1:]:
        if a == joined[-1][1]:
            joined[-1][1] = b
        else:
            joined.append([a, b])
    parts = [x[start + a : start + b] for a, b in joined]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attention_by_chunk(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, dropout: float = 0.0) -> Tensor:
    """Any mask: calls of some rows over the keys that some of them attend to."""
    parts = []
    for (q_rows,), (k_rows,), attn_mask in mask.unpadded_calls[0]:
        picked = ((q, q_rows), (k, k_rows), (v, k_rows))
        x, keys, values = (rearrange(t.index_select(0, at), "n h k -> 1 h n k") for t, at in picked)
        if attn_mask is None:
            y = _sdpa(x, keys, values, None, dropout=dropout)
        else:
            # the softmax of no score is nan: a row that attends to nothing gets all scores, and zeros afterwards
            attends = attn_mask.any(-1, keepdim=True)
            y = _sdpa(x, keys, values, (attn_mask | ~attends)[:, None], dropout=dropout).masked_fill(~attends, 0.0)
        parts.append(rearrange(y, "1 h n k -> n h k"))
    return torch.cat(parts) if parts else torch.zeros_like(q)


def _attention_flex(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """PyTorch's FlexAttention over the same tiles, compiled on a GPU. On a CPU it computes the dense mask."""
    from torch.nn.attention.flex_attention import flex_attention

    run = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else _compiled_flex_attention()
    q, k, v = (rearrange(t, "n h k -> 1 h n k") for t in (q, k, v))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        y = run(q, k, v, block_mask=mask.default_block_mask, enable_gqa=q.shape[1] != k.shape[1])
    return rearrange(y, "1 h n k -> n h k")


# ---- the registered op, for compiled graphs, activation checkpointing and sharding


@custom_op("unimm::attention", mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    table: Tensor,
    by_row: list[Tensor],
    by_key: list[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> o [N, H, K] and the logarithm of each softmax's denominator, lse [H, N]: -inf for a row without keys.

    ranges, by_row and by_key: the mask's ranges and runs of tiles, for Triton. table: the mask as numbers, for sdpa,
    which has no tiles.
    """
    if backend == "triton":
        from unimm.kernels.attention.attention_triton import launch_attention

        return launch_attention(q, k, v, ranges, TileRuns(*by_row), _tile_config(q.device, q.shape[2], q.dtype))
    return _forward_without_triton(q, k, v, _mask_from_tensors(table, ranges, len(q)))


@custom_op("unimm::attention_backward", mutates_args=())
def _attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, ranges: Tensor, table: Tensor,
    by_row: list[Tensor], by_key: list[Tensor], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `_attention_op`: do [N, H, K] -> dq [N, H, K], dk and dv [M, G, K]."""
    if backend == "triton":
        from unimm.kernels.attention.attention_triton import launch_attention_backward

        config = _tile_config(q.device, q.shape[2], q.dtype)
        dq, dk, dv = launch_attention_backward(
            do, q, k, v, o, lse, ranges, TileRuns(*by_row), TileRuns(*by_key), config
        )
        return dq, dk, dv
    return _backward_without_triton(do, q, k, v, o, lse, _mask_from_tensors(table, ranges, len(q)))


@custom_op("unimm::decode", mutates_args=())
def _decode_op(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """A query row per sample, q [B, H, K], over `lengths` [B] int32 rows of k and v [M, G, K] from `starts` [B] on."""
    from unimm.kernels.attention.decode_triton import launch_decode

    return launch_decode(q, k, v, starts, lengths)


@_decode_op.register_fake
def _(q, k, v, starts, lengths):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_attention_op.register_fake
def _(q, k, v, ranges, table, by_row, by_key, backend):  # type: ignore[no-untyped-def]
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=_accumulation_dtype(q))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@_attention_backward_op.register_fake
def _(do, q, k, v, o, lse, ranges, table, by_row, by_key, backend):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, ranges, table, by_row, by_key, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, ranges, table, *by_row, *by_key)
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx, do, _):  # type: ignore[no-untyped-def]
    q, k, v, o, lse, ranges, table, *runs = (
        ctx.saved_tensors
    )  # read once: checkpointing recomputes them at every access
    half = len(runs) // 2
    grads = _attention_backward_op(do, q, k, v, o, lse, ranges, table, runs[:half], runs[half:], ctx.backend)
    return *grads, None, None, [None] * half, [None] * half, None


_attention_op.register_autograd(_attention_gradients, setup_context=_setup_context)


# ---- the op without Triton; no gradient is recorded inside an op, so the backward pass is written out


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of softmax and of sums."""
    return torch.promote_types(x.dtype, torch.float32)


def _mask_from_tensors(table: Tensor, ranges: Tensor, n_queries: int) -> AttentionMask:
    """The mask of an op's arguments; the last few are cached, since every layer needs the same."""
    made_from_ranges = not table[0, 0]
    content = ranges.cpu() if made_from_ranges else table
    return _cached_mask(
        content.numpy().tobytes(), tuple(content.shape), n_queries if made_from_ranges else None, ranges.device
    )


@lru_cache(maxsize=16)
def _cached_mask(content: bytes, shape: tuple[int, ...], n_queries: int | None, device: torch.device) -> AttentionMask:
    if n_queries is None:
        return AttentionMask.from_table(torch.frombuffer(bytearray(content), dtype=torch.int64).reshape(shape), device)
    pairs = torch.frombuffer(bytearray(content), dtype=torch.int32).reshape(shape)
    return AttentionMask.from_ranges(*pairs[0], *(map(tuple, pairs[1:])), n_queries=n_queries, device=device)


def _forward_without_triton(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    calls, result_rows = mask.sdpa_calls
    outs = []
    sums = []
    for call in calls:
        qs = _gather_heads(q, call.q_rows, k)
        ks = _gather_heads(k, call.k_rows)
        vs = _gather_heads(v, call.k_rows)
        scores = _scores(qs, ks, call)
        lse = scores.logsumexp(-1, keepdim=True)
        p = (scores - lse.masked_fill(lse == float("-inf"), 0.0)).exp_().to(v.dtype)
        outs.append(rearrange(p @ vs, "b g (r n) k -> (b n) (g r) k", n=call.q_rows.shape[1]))
        sums.append(rearrange(lse, "b g (r n) 1 -> (b n) (g r)", n=call.q_rows.shape[1]))
    if not calls:
        return torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=_accumulation_dtype(q))
    return torch.cat(outs).index_select(0, result_rows), torch.cat(sums).index_select(0, result_rows).t().contiguous()


def _backward_without_triton(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: AttentionMask
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-2, algorithm 2 (arXiv 2307.08691), call by call: p from lse, ds = p * (dp - sum(o * do))."""
    calls, result_rows = mask.sdpa_calls
    wide = _accumulation_dtype(q)
    dqs = []
    dk = torch.zeros_like(k, dtype=wide)
    dv = torch.zeros_like(v, dtype=wide)
    sizes = [call.q_rows.numel() for call in calls]
    rows = sum(sizes)
    # in the order of the calls; lse is inf, and so p = 0, for padding rows and rows that attend to nothing
    lse = lse.t().masked_fill(lse.t() == float("-inf"), float("inf"))
    lse = lse.new_full((rows, q.shape[1]), float("inf")).index_copy_(0, result_rows, lse)
    delta = lse.new_zeros(lse.shape).index_copy_(0, result_rows, (o.to(wide) * do).sum(-1, dtype=wide))
    do = do.new_zeros(rows, *do.shape[1:]).index_copy_(0, result_rows, do)
    for call, lse_, delta_, do_ in zip(calls, *(x.split(sizes) for x in (lse, delta, do)), strict=True):
        b, n = call.q_rows.shape
        qs = _gather_heads(q, call.q_rows, k)
        ks = _gather_heads(k, call.k_rows)
        vs = _gather_heads(v, call.k_rows)
        shape = dict(b=b, g=k.shape[1])
        lse_, delta_ = (rearrange(x, "(b n) (g r) -> b g (r n) 1", **shape) for x in (lse_, delta_))
        do_ = rearrange(do_, "(b n) (g r) k -> b g (r n) k", **shape)
        p = (_scores(qs, ks, call) - lse_).exp_()
        ds = ((do_ @ vs.mT).to(wide).sub_(delta_).mul_(p) * q.shape[2] ** -0.5).to(q.dtype)
        dqs.append(rearrange(ds @ ks, "b g (r n) k -> (b n) (g r) k", n=n))
        at = call.k_rows.flatten()
        for grad, part in ((dk, ds.mT @ qs), (dv, p.to(v.dtype).mT @ do_)):
            grad.index_add_(0, at, rearrange(part.to(wide), "b g m k -> (b m) g k"))
    dq = torch.cat(dqs).index_select(0, result_rows) if dqs else torch.zeros_like(q)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _gather_heads(x: Tensor, rows: Tensor, like: Tensor | None = None) -> Tensor:
    """Rows [B, n] of x [N, H, K] -> [B, G, r n, K], the r query heads of each of the key heads of `like`, or of x."""
    g = x.shape[1] if like is None else like.shape[1]
    return rearrange(x.index_select(0, rows.flatten()), "(b n) (g r) k -> b g (r n) k", b=len(rows), g=g)


def _scores(q: Tensor, k: Tensor, call: SDPACall) -> Tensor:
    """q [B, G, r n, K], k [B, G, m, K] -> [B, G, r n, m], -inf where the mask hides the key."""
    scores = (q @ k.mT * q.shape[3] ** -0.5).to(_accumulation_dtype(q))
    if call.attn_mask is None:
        return scores
    hidden = repeat(~call.attn_mask, "b n m -> b 1 (r n) m", r=q.shape[2] // call.q_rows.shape[1])
    return scores.masked_fill_(hidden, float("-inf"))


@lru_cache(maxsize=1)
def _compiled_flex_attention():  # type: ignore[no-untyped-def]
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
