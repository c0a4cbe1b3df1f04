"""Contexts that grow: items appended in one packed forward, then one row at a time.

What every family with a language model shares. Axes: B contexts, N packed rows, D model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from unimm.generation.causal_lm import CausalLM, check_max_positions
from unimm.generation.kv_cache import KVCache, allocate_kv_buffer
from unimm.generation.text_sampling import TextSampling, sample_token
from unimm.kernels import AttentionMask, KeyRange


class DecodeSession:
    """One new row at a time behind each of several contexts, all in one buffer with room for `room` rows each.

    The rows are of the decoder's first stream. On a CPU the buffer is in float32: one row in bfloat16 attends there four
    times as slowly as in float32 (600 keys, 2 samples, 16 heads of 128: 25 ms against 6). Raises ValueError where the rows
    would outgrow the positions that the model knows.
    """

    def __init__(self, model: CausalLM, caches: Sequence[KVCache], capacity: int):
        check_max_positions(model, max(c.next_position for c in caches) + capacity)
        self.decoder, self.device, self.capacity = model.decoder, model.device, capacity
        wide = torch.promote_types(model.dtype, torch.float32) if self.device.type == "cpu" else model.dtype
        self.buffer = allocate_kv_buffer(model, caches, [capacity] * len(caches), dtype=wide)
        self.prefix_lengths = [c.length for c in caches]
        self.rows_by_expert = {self.decoder.config.experts[0]: torch.arange(len(caches), device=self.device)}
        # of every step, once: [room, B]
        steps = torch.arange(capacity, device=self.device)[:, None]
        self.position_ids = steps + torch.tensor([c.next_position for c in caches], device=self.device)
        starts = torch.tensor(
            [p + n for p, n in zip(self.buffer.starts, self.prefix_lengths, strict=True)], device=self.device
        )
        self.buffer_slots = steps + starts

    def __call__(self, x: Tensor, n_written: int) -> Tensor:
        """The `behind`-th new row of each context, x [B, D] -> last hidden states [B, D], before the final norm."""
        seen = [[KeyRange(n + n_written + 1)] for n in self.prefix_lengths]
        mask = AttentionMask(seen, query_lengths=[1] * len(seen), key_starts=self.buffer.starts, device=self.device)
        attend = self.buffer.attend_at_slots(self.buffer_slots[n_written], mask)
        (hidden,) = self.decoder(x, self.position_ids[n_written], self.rows_by_expert, attend).values()
        return hidden


def decode_text(
    model: CausalLM,
    caches: Sequence[KVCache],
    first: Sequence[int],
    *,
    end: int | Sequence[int],
    sampling: TextSampling,
    seeds: Sequence[int],
) -> Iterator[list[int | None]]:
    """Text after each context and a `first` id, until `end`: one id a context at a time, None for those that have ended."""
    rows = DecodeSession(model, caches, sampling.token_limit)

    @torch.inference_mode()
    def step(ids: list[int], behind: int) -> Tensor:
        x = model.decoder.embed(torch.tensor(ids, device=model.device))
        return model.decoder.logits(rows(x, behind))

    return sampling_loop(step, list(first), end=end, sampling=sampling, seeds=seeds)


def sampling_loop(
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
    for n in range(sampling.token_limit):
        ids = sample_token(step(ids, n), sampling, generators)
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
            if self.stop and all(self._truncate_at_stop(text) != text for text in map(self.decode, ids)):
                break
        return [self._truncate_at_stop(self.decode(row)) for row in ids]

    def pieces(self) -> Iterator[str]:
        """The text of a single row as it grows; what may still change (half a character, half a stop string) is held back."""
        ids: list[int] = []
        given, text = 0, ""
        held = max((len(s) for s in self.stop), default=0)
        for (one,) in self.steps:
            ids += [] if one is None else [one]
            text = self.decode(ids)
            if self._truncate_at_stop(text) != text:
                break
            safe = len(text) - held
            if safe > given and not text.endswith("\ufffd"):
                yield text[given:safe]
                given = safe
        if rest := self._truncate_at_stop(text)[given:]:
            yield rest

    def _truncate_at_stop(self, text: str) -> str:
        return text[: min((text.index(s) for s in self.stop if s in text), default=len(text))]
