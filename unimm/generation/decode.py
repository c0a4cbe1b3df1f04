"""Contexts that grow: items appended in one packed forward, then one row at a time.

What every family with a language model shares. Axes: B contexts, N packed rows, D model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from unimm.generation.causal_lm import Speaker, check_position
from unimm.generation.kv_cache import Context, cache_of
from unimm.generation.text_sampling import TextSampling, next_ids
from unimm.kernels import Block, Mask


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

    def __init__(
        self, steps: Iterator[list[int | None]], decode: Callable[[list[int]], str], rows: int, stop: tuple[str, ...]
    ):
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
