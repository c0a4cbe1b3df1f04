"""Generalized causal attention over packed sequences: one mask, one call, for training, prefill and denoising.

Axes: N query rows, M key rows, H query heads, G key/value heads (H a multiple of G), K head.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from unimm.kernels.dispatch import backend

# samples up to this many key rows share padded calls with a mask: many small calls cost more than what they skip;
# longer ones get a call a block, which computes nothing that is masked out
PADDED_ROWS = 512
BUCKET_ROWS, BUCKET_SAMPLES = 32, 8  # lengths and counts are rounded up to these before they share a call


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one sample under one rule: causal or full inside, visible or not to later rows."""

    length: int
    full: bool = False
    visible: bool = True


class Mask:
    """Who sees whom, as one range of rows a key: query row q sees key row k when first[k] <= q < last[k].

    `samples` lists the blocks of each sample in order. Inside a sample, q sees k when k's block is visible or is
    q's own, and k stands before q (or is q), or both stand in one full block. For a key that means: from its own
    row (causal) or its block's first row (full), to the end of its sample (visible) or of its block (not).

        text(3) causal, image(2) full, noised(2) full and invisible, text(1) causal

            key    0 1 2 | 3 4 | 5 6 | 7      as a key: first last
            row 0  x . . | . . | . . | .                0     8
            row 1  x x . | . . | . . | .                1     8
            row 2  x x x | . . | . . | .                2     8
            row 3  x x x | x x | . . | .                3     8
            row 4  x x x | x x | . . | .                3     8
            row 5  x x x | x x | x x | .                5     7
            row 6  x x x | x x | x x | .                5     7
            row 7  x x x | x x | . . | x                7     8

    queries: how many rows at the end of each sample ask; all of them unless given (the rest is a cache).
    key_starts: where each sample's keys begin in the key buffer; end to end unless given.
    """

    def __init__(
        self,
        samples: Sequence[Sequence[Block]],
        *,
        queries: Sequence[int] | None = None,
        key_starts: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.samples = tuple(tuple(block for block in blocks if block.length) for blocks in samples)
        self.keys = tuple(sum(block.length for block in blocks) for blocks in self.samples)
        self.queries = self.keys if queries is None else tuple(queries)
        self.query_starts = _starts(self.queries)
        self.key_starts = _starts(self.keys) if key_starts is None else tuple(key_starts)
        self.device = torch.device(device)
        if any(n > m for n, m in zip(self.queries, self.keys, strict=True)):
            raise ValueError(f"a sample asks with more rows than it has: queries {self.queries}, rows {self.keys}")

    def to(self, device: torch.device | str) -> "Mask":
        """The same mask on a device."""
        return Mask(self.samples, queries=self.queries, key_starts=self.key_starts, device=device)

    def ranges(self, sample: int) -> Tensor:
        """The range of rows that sees each key of one sample, [2, M] int32, in rows of that sample."""
        first, last, at = [], [], 0
        for block in self.samples[sample]:
            end = at + block.length
            first.append(torch.full((block.length,), at) if block.full else torch.arange(at, end))
            last.append(torch.full((block.length,), self.keys[sample] if block.visible else end))
            at = end
        return torch.stack((torch.cat(first), torch.cat(last))).int()

    def of(self, sample: int) -> Tensor:
        """The mask of one sample, [N, M] bool."""
        if not self.queries[sample]:
            return torch.zeros(0, self.keys[sample], dtype=torch.bool)
        first, last = self.ranges(sample)
        rows = torch.arange(self.keys[sample] - self.queries[sample], self.keys[sample])[:, None]
        return (rows >= first) & (rows < last)

    def dense(self, n_keys: int | None = None) -> Tensor:
        """The whole mask, [N, M] bool: the definition, for tests and the reference. M is `n_keys` for a larger buffer."""
        n_keys = n_keys or max(map(sum, zip(self.key_starts, self.keys, strict=True)))
        out = torch.zeros(sum(self.queries), n_keys, dtype=torch.bool)
        for i, (q, k) in enumerate(zip(self.query_starts, self.key_starts, strict=True)):
            out[q : q + self.queries[i], k : k + self.keys[i]] = self.of(i)
        return out.to(self.device)

    @cached_property
    def buckets(self) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """For one call a bucket of samples of like length, padded: query rows [B, n], key rows [B, m] and mask
        [B, n, m] of each bucket; and where each packed row lies in the buckets' results end to end [N]."""
        groups: dict[int, list[int]] = {}
        for i, n_k in enumerate(self.keys):
            if self.queries[i]:  # a sample may be empty, or only looked at
                groups.setdefault(_up(n_k, BUCKET_ROWS), []).append(i)
        out, back, total = [], torch.empty(sum(self.queries), dtype=torch.long), 0
        for samples in groups.values():
            # few different shapes: a matrix product compiles itself for each one (oneDNN), which costs more than padding
            b, n = _up(len(samples), BUCKET_SAMPLES), max(self.queries[i] for i in samples)
            n, m = n if n == 1 else _up(n, BUCKET_ROWS), _up(max(self.keys[i] for i in samples), BUCKET_ROWS)
            q_rows, k_rows = torch.zeros(b, n, dtype=torch.long), torch.full((b, m), self.key_starts[samples[0]])
            allowed = torch.zeros(b, n, m, dtype=torch.bool)
            allowed[:, :, 0] = True  # a padding row looks at something, so that its softmax is a number
            for row, i in enumerate(samples):
                n_q, n_k = self.queries[i], self.keys[i]
                asking = torch.arange(n_q)
                q_rows[row, :n_q] = asking + self.query_starts[i]
                k_rows[row] = self.key_starts[i]  # padding keys are a row that holds numbers: unwritten ones may not
                k_rows[row, :n_k] += torch.arange(n_k)
                allowed[row, :n_q, :n_k] = self.of(i)
                back[self.query_starts[i] + asking] = total + row * n + asking
            total += b * n
            out.append((q_rows.to(self.device), k_rows.to(self.device), allowed.to(self.device)))
        return out, back.to(self.device)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(K) under `mask`) v, grouped-query: q [N, H, K], k and v [M, G, K] -> [N, H, K].

    Packed: the samples of `mask` lie end to end in q, and at its `key_starts` in k and v. Raises ValueError where
    the shapes disagree with each other or with the mask.
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"attention needs q [N, H, K], k = v [M, G, K], H % G == 0; got {[tuple(t.shape) for t in (q, k, v)]}")
    if q.shape[0] != sum(mask.queries):
        raise ValueError(f"attention got {q.shape[0]} query rows, the mask describes {sum(mask.queries)}")
    if backend() == "reference":
        return attention_reference(q, k, v, mask)
    if max(mask.keys) <= PADDED_ROWS and len(mask.samples) > 1:
        return _attention_padded(q, k, v, mask)
    return _attention_by_block(q, k, v, mask)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The definition, in plain operations, with a dense mask. Rows that nobody wrote must hold numbers."""
    k, v = (repeat(t, "m g k -> m (g r) k", r=q.shape[1] // k.shape[1]) for t in (k, v))
    scores = torch.einsum("nhk, mhk -> hnm", q, k) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~mask.dense(k.shape[0]), float("-inf"))
    return torch.einsum("hnm, mhk -> nhk", scores.softmax(-1), v)


def _attention_padded(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Samples of like length padded to one, a call a bucket."""
    buckets, back = mask.buckets
    parts = []
    for q_rows, k_rows, allowed in buckets:
        b = len(q_rows)
        q_pad = rearrange(q.index_select(0, q_rows.flatten()), "(b n) h k -> b h n k", b=b)
        k_pad, v_pad = (rearrange(t.index_select(0, k_rows.flatten()), "(b m) g k -> b g m k", b=b) for t in (k, v))
        # the fused backward is slow here: 15.4 ms against 2.3 written out, forward and backward, 40 samples of 64 rows
        slow = q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"
        y = (_written_out if slow else _fused)(q_pad, k_pad, v_pad, allowed[:, None])
        parts.append(rearrange(y, "b h n k -> (b n) h k"))
    return torch.cat(parts).index_select(0, back)


def _fused(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, allowed, enable_gqa=q.shape[1] != k.shape[1])


def _written_out(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """q [B, H, n, K], k and v [B, G, m, K], allowed [B, 1, n, m] -> [B, H, n, K]; softmax in float32."""
    g, n = k.shape[1], q.shape[2]
    scores = rearrange(q, "b (g r) n k -> b g (r n) k", g=g) @ rearrange(k, "b g m k -> b g k m") * q.shape[3] ** -0.5
    scores = rearrange(scores.float(), "b g (r n) m -> b (g r) n m", n=n).masked_fill(~allowed, float("-inf"))
    p = rearrange(scores.softmax(-1).to(v.dtype), "b (g r) n m -> b g (r n) m", g=g)
    return rearrange(p @ v, "b g (r n) k -> b (g r) n k", n=n)


def _attention_by_block(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """One call for each block of queries over just the rows it sees: no masked-out work, no dense mask."""
    parts = []
    for i, blocks in enumerate(mask.samples):
        key_at, row = mask.key_starts[i], 0
        seen: list[tuple[int, int]] = []
        cached = mask.keys[i] - mask.queries[i]
        for block in blocks:
            keys = [*seen, (row, row + block.length)]
            if block.visible:
                seen = keys
            row += block.length
            n = min(block.length, row - cached)  # rows of this block that ask
            if n > 0:
                at = mask.query_starts[i] + row - cached - n
                parts.append(_attend(q[at : at + n], *(_rows(t, key_at, keys) for t in (k, v)), causal=not block.full))
    return torch.cat(parts)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Plain attention of n queries that are the last n of m keys."""
    n, m = q.shape[0], k.shape[0]
    allowed = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n) if causal and n > 1 else None
    q, k, v = (rearrange(t, "n h k -> 1 h n k") for t in (q, k, v))
    return rearrange(_fused(q, k, v, allowed), "1 h n k -> n h k")


def _rows(x: Tensor, start: int, spans: list[tuple[int, int]]) -> Tensor:
    """The rows of several spans; a slice, not a copy, where they touch."""
    joined = [list(spans[0])]
    for a, b in spans[1:]:
        if a == joined[-1][1]:
            joined[-1][1] = b
        else:
            joined.append([a, b])
    parts = [x[start + a : start + b] for a, b in joined]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _starts(lengths: Sequence[int]) -> tuple[int, ...]:
    total, starts = 0, []
    for n in lengths:
        starts.append(total)
        total += n
    return tuple(starts)
