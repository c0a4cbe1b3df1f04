"""KV caches: keys and values of prefixes as values, and the buffer in which several of them grow.

Axes: B caches, N packed rows, M rows of a buffer, H query heads, G key/value heads, K head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unimm.kernels import AttentionMask, attention
from unimm.nn.decoder import AttentionFn, CausalDecoder, DecoderSizes
from unimm.sequence.parts import Part
from unimm.sequence.segments import CachedPrefix


@dataclass(frozen=True, eq=False)
class KVCache:
    """The keys and values of a prefix, as a value: appending makes another cache, and both share what came before.

    chunks: keys (normalized and rotated) and values of each appended part, [layers, 2, n, G, K]. next_position: the
    rotary position of the next row.
    """

    chunks: tuple[Tensor, ...] = ()
    next_position: int = 0

    @property
    def length(self) -> int:
        """The number of rows."""
        return sum(chunk.shape[2] for chunk in self.chunks)

    def fork(self) -> "KVCache":
        """Another cache of the same prefix, to be extended on its own; copies no tensor."""
        return replace(self)

    def appended(self, chunk: Tensor, next_position: int) -> "KVCache":
        """This cache and one more chunk, [layers, 2, n, G, K]."""
        return KVCache((*self.chunks, chunk), next_position)


EMPTY_CACHE = KVCache()


class KVBuffer:
    """The keys and values of several caches in one tensor, each followed by free rows.

    It is allocated once. A forward writes its rows behind a prefix and attends over [prefix; new rows]: denoising
    overwrites the same rows at every step, decoding appends one row per step.
    """

    def __init__(self, caches: Sequence[KVCache], capacity: Sequence[int], *, empty: Tensor):
        self.caches = tuple(caches)
        ends = torch.tensor([c.length + n for c, n in zip(caches, capacity, strict=True)]).cumsum(0).tolist()
        self.starts = [0, *ends[:-1]]
        layers, two, _, heads, head_dim = empty.shape
        # zeros, since the reference attention also reads unwritten rows, and 0 * nan is nan
        self.buffer = empty.new_zeros(layers, two, ends[-1], heads, head_dim)
        for start, cache in zip(self.starts, caches, strict=True):
            if cache.chunks:
                self.buffer[:, :, start : start + cache.length] = torch.cat(cache.chunks, 2)

    def prefix(self, i: int, *, n_written: int = 0) -> CachedPrefix:
        """The prefix of the next rows of cache i: its own rows and the `n_written` ones written behind them."""
        cache = self.caches[i]
        return CachedPrefix(
            length=cache.length + n_written,
            next_position=cache.next_position + n_written,
            buffer_start=self.starts[i],
        )

    def attend(self, prefixes: Sequence[CachedPrefix], mask: AttentionMask) -> AttentionFn:
        """The attention of one forward: it writes each sample's new keys and values behind its prefix, then attends."""
        rows = [
            p.length + (p.buffer_start or 0) + torch.arange(n)
            for p, n in zip(prefixes, mask.query_lengths, strict=True)
        ]
        return self.attend_at_slots(torch.cat(rows).to(self.buffer.device), mask)

    def attend_at_slots(self, slots: Tensor, mask: AttentionMask) -> AttentionFn:
        """The same for new rows at these rows of the buffer, [N]."""
        return attend_in_buffer(self.buffer, slots, mask)

    def copy_new_rows(self, i: int, n: int) -> Tensor:
        """A copy of the first n rows written behind cache i, [layers, 2, n, G, K]."""
        start = self.starts[i] + self.caches[i].length
        return self.buffer[:, :, start : start + n].clone()


def attend_in_buffer(buffer: Tensor, slots: Tensor, mask: AttentionMask) -> AttentionFn:
    """The attention of one forward over a buffer [layers, 2, M, G, K]: it writes the new keys and values of each layer
    at the rows `slots` [N], then attends."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = buffer[layer]
        keys.index_copy_(0, slots, k.to(keys.dtype))
        values.index_copy_(0, slots, v.to(values.dtype))
        if keys.dtype.itemsize > q.dtype.itemsize:  # a wider buffer: casting it down would copy it at every step
            return attention(q.to(keys.dtype), keys, values, mask, by_sample=True).to(q.dtype)
        return attention(q, keys.to(q.dtype), values.to(q.dtype), mask)

    return attend


def allocate_kv_buffer(
    decoder: CausalDecoder, caches: Sequence[KVCache], capacity: Sequence[int], *, dtype: torch.dtype | None = None
) -> KVBuffer:
    """A buffer that holds the caches, with `capacity` free rows behind each; in the decoder's dtype unless given."""
    config = decoder.config
    weight = decoder.embed.weight
    # of the weights, so that it has values where they have
    empty = weight.new_empty(
        (config.n_layers, 2, 0, decoder.n_cached_heads, config.head_dim), dtype=dtype or weight.dtype
    )
    return KVBuffer(caches, capacity, empty=empty)


def check_fits(
    config: DecoderSizes, parts: Sequence[Sequence[Part]], *, caches: Sequence[KVCache] = (), n_more: int = 0
) -> None:
    """Raise ValueError where parts behind each cache, and `n_more` rows, would reach a position beyond the last.

    It looks at the parts' lengths alone: what will be refused is refused before anything is allocated or computed.
    """
    starts = [cache.next_position for cache in caches] or [0] * len(parts)
    ends = [start + sum(part.segment.advance for part in new) for start, new in zip(starts, parts, strict=True)]
    check_max_positions(config, max(ends) + n_more)


def check_max_positions(config: DecoderSizes, position: int) -> None:
    """Raise ValueError where a sequence would reach a position beyond the decoder's last."""
    if position > config.max_positions:
        raise ValueError(
            f"the sequence would reach position {position}, the model knows {config.max_positions}: expected a shorter "
            "prompt, fewer max_tokens, or an image of a smaller size"
        )
