"""Contexts that grow: items appended in one packed forward, then one row at a time.

What every family with a language model shares. Axes: B contexts, N packed rows, D model, V vocabulary.
"""
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from unimm.generation.kv_cache import Cache, Context, TextSampling, decode
from unimm.kernels import Block, Mask
from unimm.nn.decoder import Decoder, Parts
from unimm.sequence.segments import Item, Pack, pack


class Speaker(Protocol):
    """What a model brings to a context."""

    @property
    def decoder(self) -> Decoder: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def hidden(self, batch: Pack, attend: Any) -> Parts:
        """Last hidden states of every row of a pack, by stream, before the final norms."""


@torch.inference_mode()
def extend(model: Speaker, contexts: Sequence[Context], items: Sequence[Sequence[Item]]) -> list[Context]:
    """Append items to each context, all in one packed forward; the contexts given stay as they are.

    Raises ValueError where a context would outgrow the positions that the model knows.
    """
    lengths = [sum(item.segment.length for item in more) for more in items]
    if not any(lengths):
        return list(contexts)
    cache = cache_of(model, contexts, lengths)
    past = [cache.past(i) for i in range(len(contexts))]
    batch = pack(items, past, device=model.device)
    check_position(model, max(batch.layout.clocks))
    model.hidden(batch, cache.attend(past, batch.layout.mask))
    return [c.extended(cache.chunk(i, lengths[i]), batch.layout.clocks[i]) for i, c in enumerate(contexts)]


class Rows:
    """One new row at a time behind each of several contexts, all in one buffer with room for `room` rows each.

    The rows are of the decoder's first stream. On a CPU the buffer is in float32: one row in bfloat16 attends there four
    times as slowly as in float32 (600 keys, 2 samples, 16 heads of 128: 25 ms against 6). Raises ValueError where the rows
    would outgrow the positions that the model knows.
    """

    def __init__(self, model: Speaker, contexts: Sequence[Context], room: int):
        check_position(model, max(c.clock for c in contexts) + room)
        self.decoder, self.device, self.room = model.decoder, model.device, room
        wide = torch.promote_types(model.dtype, torch.float32) if self.device.type == "cpu" else model.dtype
        self.cache = cache_of(model, contexts, [room] * len(contexts), dtype=wide)
        self.lengths = [c.length for c in contexts]
        self.rows = {self.decoder.cfg.streams[0]: torch.arange(len(contexts), device=self.device)}
        # of every step, once: [room, B]
        steps = torch.arange(room, device=self.device)[:, None]
        self.positions = steps + torch.tensor([c.clock for c in contexts], device=self.device)
        starts = torch.tensor([p + n for p, n in zip(self.cache.starts, self.lengths, strict=True)], device=self.device)
        self.places = steps + starts

    def __call__(self, x: Tensor, behind: int) -> Tensor:
        """The `behind`-th new row of each context, x [B, D] -> last hidden states [B, D], before the final norm."""
        seen = [[Block(n + behind + 1)] for n in self.lengths]
        mask = Mask(seen, queries=[1] * len(seen), key_starts=self.cache.starts, device=self.device)
        attend = self.cache.attend_at(self.places[behind], mask)
        (hidden,) = self.decoder(x, self.positions[behind], self.rows, attend).values()
        return hidden


def speak(
    model: Speaker,
    contexts: Sequence[Context],
    first: Sequence[int],
    *,
    end: int | Sequence[int],
    sampling: TextSampling,
    seeds: Sequence[int],
) -> Iterator[list[int | None]]:
    """Text after each context and a `first` id, until `end`: one id a context at a time, None for those that have ended."""
    rows = Rows(model, contexts, sampling.tokens)

    @torch.inference_mode()
    def step(ids: list[int], behind: int) -> Tensor:
        x = model.decoder.embed(torch.tensor(ids, device=model.device))
        return model.decoder.logits(rows(x, behind))

    return decode(step, list(first), end=end, sampling=sampling, seeds=seeds)


def cache_of(
    model: Speaker, contexts: Sequence[Context], room: Sequence[int], *, dtype: torch.dtype | None = None
) -> Cache:
    """A buffer that holds the contexts, with room for more rows behind each; in the model's dtype unless given."""
    d = model.decoder.cfg
    empty = torch.empty(d.n_layers, 2, 0, d.n_kv_heads, d.head_dim, dtype=dtype or model.dtype, device=model.device)
    return Cache(contexts, room, empty=empty)


def check_position(model: Speaker, clock: int) -> None:
    """Raise ValueError for a position that the model does not know."""
    known = model.decoder.cfg.max_positions
    if clock > known:
        raise ValueError(f"the dialogue would reach position {clock}, the model knows {known}: shorten it, or max_tokens")
