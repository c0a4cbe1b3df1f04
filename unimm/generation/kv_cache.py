"""Contexts and their key/value cache; choosing the next token.

Axes: B contexts, M cached rows, G key/value heads, K head, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unimm.generation.causal_lm import CausalLM
from unimm.kernels import AttentionMask, attention
from unimm.sequence.segments import CachedPrefix


@dataclass(frozen=True, eq=False)
class KVCache:
    """What was said so far, as a value: extending one makes another, and both share the prefix.

    chunks: keys (normed and turned) and values of each extension, [layers, 2, n, G, K]. clock: the next rotary position.
    """

    chunks: tuple[Tensor, ...] = ()
    next_position: int = 0

    @property
    def length(self) -> int:
        """Rows held."""
        return sum(chunk.shape[2] for chunk in self.chunks)

    def fork(self) -> "KVCache":
        """A second name for the same past, to be extended on its own; copies no tensor."""
        return replace(self)

    def appended(self, chunk: Tensor, next_position: int) -> "KVCache":
        """This context and one more chunk."""
        return KVCache((*self.chunks, chunk), next_position)


EMPTY_CACHE = KVCache()


class KVBuffer:
    """Keys and values of several contexts in one buffer, each with room for more rows behind it.

    The buffer is allocated once; a forward writes its rows into the room and attends over [past; room]. Denoising
    overwrites the same room at every step, decoding moves on by a row.
    """

    def __init__(self, caches: Sequence[KVCache], capacity: Sequence[int], *, empty: Tensor):
        self.caches = tuple(caches)
        ends = torch.tensor([c.length + n for c, n in zip(caches, capacity, strict=True)]).cumsum(0).tolist()
        self.starts = [0, *ends[:-1]]
        layers, two, _, heads, head_dim = empty.shape
        # zeros, not garbage: the reference reads rows that nobody wrote, and 0 * nan is nan
        self.buffer = empty.new_zeros(layers, two, ends[-1], heads, head_dim)
        for start, context in zip(self.starts, caches, strict=True):
            if context.chunks:
                self.buffer[:, :, start : start + context.length] = torch.cat(context.chunks, 2)

    def prefix(self, i: int, *, n_written: int = 0) -> CachedPrefix:
        """What context i's next rows come after; `behind` rows of its room are filled already."""
        context = self.caches[i]
        return CachedPrefix(
            length=context.length + n_written,
            next_position=context.next_position + n_written,
            buffer_start=self.starts[i],
        )

    def attend(
        self, prefixes: Sequence[CachedPrefix], mask: AttentionMask
    ) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """An attention for one forward: writes each sample's new keys and values behind its past, then attends."""
        rows = [
            p.length + (p.buffer_start or 0) + torch.arange(n)
            for p, n in zip(prefixes, mask.query_lengths, strict=True)
        ]
        return self.attend_at_slots(torch.cat(rows).to(self.buffer.device), mask)

    def attend_at_slots(self, slots: Tensor, mask: AttentionMask) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """The same, the new rows' places in the buffer given [N]."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.buffer[layer]
            keys.index_copy_(0, slots, k.to(keys.dtype))
            values.index_copy_(0, slots, v.to(values.dtype))
            if keys.dtype.itemsize > q.dtype.itemsize:  # a wider cache, which is not to be narrowed at every row
                return attention(q.to(keys.dtype), keys, values, mask).to(q.dtype)
            return attention(q, keys.to(q.dtype), values.to(q.dtype), mask)

        return attend

    def copy_new_rows(self, i: int, n: int) -> Tensor:
        """The first n rows of context i's room, copied out: [layers, 2, n, G, K]."""
        start = self.starts[i] + self.caches[i].length
        return self.buffer[:, :, start : start + n].clone()


def allocate_kv_buffer(
    model: CausalLM, caches: Sequence[KVCache], capacity: Sequence[int], *, dtype: torch.dtype | None = None
) -> KVBuffer:
    """A buffer that holds the contexts, with room for more rows behind each; in the model's dtype unless given."""
    d = model.decoder.config
    empty = torch.empty(d.n_layers, 2, 0, d.n_kv_heads, d.head_dim, dtype=dtype or model.dtype, device=model.device)
    return KVBuffer(caches, capacity, empty=empty)
