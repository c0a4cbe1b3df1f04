"""Contexts and their key/value cache; choosing the next token.

Axes: B contexts, M cached rows, G key/value heads, K head, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unimm.generation.causal_lm import Speaker
from unimm.kernels import Mask, attention
from unimm.sequence.segments import Past


@dataclass(frozen=True, eq=False)
class Context:
    """What was said so far, as a value: extending one makes another, and both share the prefix.

    chunks: keys (normed and turned) and values of each extension, [layers, 2, n, G, K]. clock: the next rotary position.
    """

    chunks: tuple[Tensor, ...] = ()
    clock: int = 0

    @property
    def length(self) -> int:
        """Rows held."""
        return sum(chunk.shape[2] for chunk in self.chunks)

    def fork(self) -> "Context":
        """A second name for the same past, to be extended on its own; copies no tensor."""
        return replace(self)

    def extended(self, chunk: Tensor, clock: int) -> "Context":
        """This context and one more chunk."""
        return Context((*self.chunks, chunk), clock)


EMPTY = Context()


class Cache:
    """Keys and values of several contexts in one buffer, each with room for more rows behind it.

    The buffer is allocated once; a forward writes its rows into the room and attends over [past; room]. Denoising
    overwrites the same room at every step, decoding moves on by a row.
    """

    def __init__(self, contexts: Sequence[Context], room: Sequence[int], *, empty: Tensor):
        self.contexts = tuple(contexts)
        ends = torch.tensor([c.length + n for c, n in zip(contexts, room, strict=True)]).cumsum(0).tolist()
        self.starts = [0, *ends[:-1]]
        layers, two, _, heads, head_dim = empty.shape
        # zeros, not garbage: the reference reads rows that nobody wrote, and 0 * nan is nan
        self.buffer = empty.new_zeros(layers, two, ends[-1], heads, head_dim)
        for start, context in zip(self.starts, contexts, strict=True):
            if context.chunks:
                self.buffer[:, :, start : start + context.length] = torch.cat(context.chunks, 2)

    def past(self, i: int, *, behind: int = 0) -> Past:
        """What context i's next rows come after; `behind` rows of its room are filled already."""
        context = self.contexts[i]
        return Past(length=context.length + behind, clock=context.clock + behind, start=self.starts[i])

    def attend(self, past: Sequence[Past], mask: Mask) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """An attention for one forward: writes each sample's new keys and values behind its past, then attends."""
        rows = [p.length + (p.start or 0) + torch.arange(n) for p, n in zip(past, mask.queries, strict=True)]
        return self.attend_at(torch.cat(rows).to(self.buffer.device), mask)

    def attend_at(self, at: Tensor, mask: Mask) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """The same, the new rows' places in the buffer given [N]."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.buffer[layer]
            keys.index_copy_(0, at, k.to(keys.dtype))
            values.index_copy_(0, at, v.to(values.dtype))
            if keys.dtype.itemsize > q.dtype.itemsize:  # a wider cache, which is not to be narrowed at every row
                return attention(q.to(keys.dtype), keys, values, mask).to(q.dtype)
            return attention(q, keys.to(q.dtype), values.to(q.dtype), mask)

        return attend

    def chunk(self, i: int, n: int) -> Tensor:
        """The first n rows of context i's room, copied out: [layers, 2, n, G, K]."""
        start = self.starts[i] + self.contexts[i].length
        return self.buffer[:, :, start : start + n].clone()


def cache_of(
    model: Speaker, contexts: Sequence[Context], room: Sequence[int], *, dtype: torch.dtype | None = None
) -> Cache:
    """A buffer that holds the contexts, with room for more rows behind each; in the model's dtype unless given."""
    d = model.decoder.cfg
    empty = torch.empty(d.n_layers, 2, 0, d.n_kv_heads, d.head_dim, dtype=dtype or model.dtype, device=model.device)
    return Cache(contexts, room, empty=empty)
