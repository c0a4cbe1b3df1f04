"""Contexts and their key/value cache; choosing the next token.

Axes: B contexts, M cached rows, G key/value heads, K head, V vocabulary.
"""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

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


MOST_TOKENS = 512  # new ids of a text, where neither a call nor a config says


@dataclass(frozen=True, kw_only=True)
class TextSampling:
    """How text is chosen. temperature 0 is greedy; top_p keeps the likeliest ids up to that mass (arXiv 1904.09751).

    max_tokens counts new ids; unless given, it is what the model's config says, or else 512. `stop` strings end the text
    and are not part of it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < inf:
            raise ValueError(f"got temperature {self.temperature}: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"got top_p {self.top_p}: expected more than 0 and at most 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"got max_tokens {self.max_tokens}: expected at least 1, or None")
        given: Any = self.stop
        stop = (given,) if isinstance(given, str) else given
        if not isinstance(stop, Sequence) or not all(isinstance(one, str) and one for one in stop):
            raise ValueError(f"got stop {self.stop!r}: expected strings of a letter or more")
        object.__setattr__(self, "stop", tuple(stop))

    @property
    def tokens(self) -> int:
        """The most new ids."""
        return MOST_TOKENS if self.max_tokens is None else self.max_tokens

    def within(self, most: int) -> "TextSampling":
        """The same, with `most` new ids where it names no number of its own."""
        return replace(self, max_tokens=most) if self.max_tokens is None else self


def next_ids(logits: Tensor, sampling: TextSampling, generators: Sequence[torch.Generator]) -> list[int]:
    """One id a row of logits [B, V]; each row draws from its own generator, so a row does not depend on its neighbours."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    p = (logits.float().cpu() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    return [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(p, generators, strict=True)]


@dataclass(frozen=True, kw_only=True)
class CodeSampling:
    """How the codes of a picture are chosen. temperature 0 takes the likeliest; top_k and top_p are off unless given."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < inf:
            raise ValueError(f"got temperature {self.temperature}: expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"got top_k {self.top_k}: expected at least 1, or None")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"got top_p {self.top_p}: expected more than 0 and at most 1")


def next_codes(logits: Tensor, sampling: CodeSampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One code a row of logits [B, V] -> [B], on their device; each row draws from its own generator, on the CPU.

    The likeliest of p / e, with e exponential, is a draw from p: no row waits for another, and nothing leaves the device.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_k is not None or sampling.top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        ordered[:, sampling.top_k or p.shape[1] :] = 0
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p * ordered.sum(-1, keepdim=True)] = 0
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    e = torch.stack([torch.empty(p.shape[1], dtype=torch.float32, device="cpu").exponential_(generator=g) for g in generators])
    return (p / e.to(p.device)).argmax(-1)


def decode(
    step: Callable[[list[int], int], Tensor],
    first: list[int],
    *,
    end: int | Sequence[int],
    sampling: TextSampling,
    seeds: Sequence[int],
) -> Iterator[list[int | None]]:
    """Feed ids, choose the next, until every row has chosen `end` (one of several) or max_tokens are out.

    Yields one id a row, None for a row that has ended; the caller may stop early by closing the iterator.
    step(ids [B], n) -> logits [B, V] after feeding the n-th id of every row.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    ids, done, ends = first, [False] * len(first), {end} if isinstance(end, int) else set(end)
    for n in range(sampling.tokens):
        ids = next_ids(step(ids, n), sampling, generators)
        done = [was or chosen in ends for was, chosen in zip(done, ids, strict=True)]
        if all(done):
            return
        yield [None if over else chosen for over, chosen in zip(done, ids, strict=True)]


class TextStream:
    """Ids as they come, for several rows, to texts: whole, or piece by piece; cut at the first stop string."""

    def __init__(self, steps: Iterator[list[int | None]], decode: Callable[[list[int]], str], rows: int, stop: tuple[str, ...]):
        self.steps, self.decode, self.rows, self.stop = steps, decode, rows, stop

    def texts(self) -> list[str]:
        """The text of every row."""
        ids: list[list[int]] = [[] for _ in range(self.rows)]
        for step in self.steps:
            for row, one in zip(ids, step, strict=True):
                row += [] if one is None else [one]
            if self.stop and all(self._cut(text) != text for text in map(self.decode, ids)):
                break
        return [self._cut(self.decode(row)) for row in ids]

    def pieces(self) -> Iterator[str]:
        """The text of a single row as it grows; what may still change (half a character, half a stop string) is held back."""
        ids: list[int] = []
        given, text = 0, ""
        held = max((len(s) for s in self.stop), default=0)
        for (one,) in self.steps:
            ids += [] if one is None else [one]
            text = self.decode(ids)
            if self._cut(text) != text:
                break
            safe = len(text) - held
            if safe > given and not text.endswith("\ufffd"):
                yield text[given:safe]
                given = safe
        if rest := self._cut(text)[given:]:
            yield rest

    def _cut(self, text: str) -> str:
        return text[: min((text.index(s) for s in self.stop if s in text), default=len(text))]
