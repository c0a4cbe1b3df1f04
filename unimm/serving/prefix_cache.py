"""Prefixes that several requests share, prefilled once: the longest common beginning of their texts."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from unimm.generation.kv_cache import KVCache
from unimm.sequence.parts import Part, TextPart, text_part

LEAST_TOKENS = 8  # a shorter prefix is not worth keeping


class PrefixCache:
    """Keys and values of texts that sequences began with, up to `max_bytes`; the least recently used go first.

    A causal row depends on the ids before it alone, so the rows of a common beginning serve every text that has it.
    Images end a prefix.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self.n_reused_tokens = 0
        self._rows: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()  # ids -> [layers, 2, n, G, K]

    def split(self, parts: Sequence[Part]) -> tuple[KVCache, list[Part]]:
        """The cache of as much of a sequence's beginning as is known, and the parts that remain: at least one row."""
        ids = leading_ids(parts)
        n_rows = sum(part.segment.length for part in parts)
        best: tuple[int, ...] = ()
        n = 0
        for known in self._rows:
            common = common_length(known, ids)
            if common > n:
                best = known
                n = common
        n = min(n, n_rows - 1)
        if n < LEAST_TOKENS:
            return KVCache(), list(parts)
        self._rows.move_to_end(best)
        self.n_reused_tokens += n
        return KVCache((self._rows[best][:, :, :n],), n), drop_ids(parts, n)

    def store(self, parts: Sequence[Part], cache: KVCache) -> None:
        """Keep the leading text of a sequence, from the cache of all of it."""
        ids = leading_ids(parts)
        if len(ids) < LEAST_TOKENS or any(common_length(known, ids) == len(ids) for known in self._rows):
            return
        rows = torch.cat(cache.chunks, 2)[:, :, : len(ids)].clone()
        if rows.nbytes > self.max_bytes:
            return
        for known in [one for one in self._rows if common_length(one, ids) == len(one)]:
            self._drop(known)
        self._rows[ids] = rows
        self.n_bytes += rows.nbytes
        while self.n_bytes > self.max_bytes:
            self._drop(next(iter(self._rows)))

    def _drop(self, ids: tuple[int, ...]) -> None:
        self.n_bytes -= self._rows.pop(ids).nbytes


def leading_ids(parts: Sequence[Part]) -> tuple[int, ...]:
    """The ids of the texts that a sequence begins with."""
    ids: list[int] = []
    for part in parts:
        if not isinstance(part, TextPart) or part.segment.attention != "causal":
            break
        ids += part.ids.tolist()
    return tuple(ids)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def drop_ids(parts: Sequence[Part], n: int) -> list[Part]:
    """Parts without their first n ids, which are of texts."""
    left = list(parts)
    while n:
        length = left[0].segment.length
        if n < length:
            left[0] = text_part(left[0].ids[n:].tolist())
            break
        del left[0]
        n -= length
    return left
