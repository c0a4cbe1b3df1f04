"""Contexts that grow: items appended in one packed forward, then one row at a time.

What every family with a language model shares. Axes: B contexts, N packed rows, D model, V vocabulary.
"""
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from unimm.models.decoder import Decoder, Parts
from unimm.sampling import Cache, Context, TextSampling, decode
from unimm.sequence import Item, Pack, Segment, lay_out, pack


class Speaker(Protocol):
    """What a model brings to a context."""

    decoder: Decoder

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
    cache = cache_of(model, contexts, lengths)
    past = [cache.past(i) for i in range(len(contexts))]
    batch = pack(items, past, device=model.device)
    check_position(model, max(batch.layout.clocks))
    model.hidden(batch, cache.attend(past, batch.layout.mask))
    return [c.extended(cache.chunk(i, lengths[i]), batch.layout.clocks[i]) for i, c in enumerate(contexts)]


class Rows:
    """One new row at a time behind each of several contexts, all in one buffer with room for `room` rows each.

    The rows are of the decoder's first stream. Raises ValueError where they would outgrow the positions it knows.
    """

    def __init__(self, model: Speaker, contexts: Sequence[Context], room: int):
        check_position(model, max(c.clock for c in contexts) + room)
        self.decoder, self.device, self.room = model.decoder, model.device, room
        self.cache = cache_of(model, contexts, [room] * len(contexts))
        self.segments = [[Segment(length=1, attend="causal", advance=1)]] * len(contexts)
        self.rows = {self.decoder.cfg.streams[0]: torch.arange(len(contexts), device=self.device)}

    def __call__(self, x: Tensor, behind: int) -> Tensor:
        """The `behind`-th new row of each context, x [B, D] -> last hidden states [B, D], before the final norm."""
        past = [self.cache.past(i, behind=behind) for i in range(len(self.segments))]
        layout = lay_out(self.segments, past, device=self.device)
        (hidden,) = self.decoder(x, layout.positions, self.rows, self.cache.attend(past, layout.mask)).values()
        return hidden


def speak(
    model: Speaker,
    contexts: Sequence[Context],
    first: Sequence[int],
    *,
    end: int,
    sampling: TextSampling,
    seeds: Sequence[int],
) -> Iterator[list[int | None]]:
    """Text after each context and a `first` id, until `end`: one id a context at a time, None for those that have ended."""
    rows = Rows(model, contexts, sampling.max_tokens)

    @torch.inference_mode()
    def step(ids: list[int], behind: int) -> Tensor:
        x = model.decoder.embed(torch.tensor(ids, device=model.device))
        return model.decoder.logits(rows(x, behind))

    return decode(step, list(first), end=end, sampling=sampling, seeds=seeds)


def cache_of(model: Speaker, contexts: Sequence[Context], room: Sequence[int]) -> Cache:
    """A buffer that holds the contexts, with room for more rows behind each."""
    d = model.decoder.cfg
    empty = torch.empty(d.n_layers, 2, 0, d.n_kv_heads, d.head_dim, dtype=model.dtype, device=model.device)
    return Cache(contexts, room, empty=empty)


def check_position(model: Speaker, clock: int) -> None:
    """Raise ValueError for a position that the model does not know."""
    known = model.decoder.cfg.max_positions
    if clock > known:
        raise ValueError(f"the dialogue would reach position {clock}, the model knows {known}: shorten it, or max_tokens")
