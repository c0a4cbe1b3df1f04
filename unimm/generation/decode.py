"""Decoding: one token at a time after several KV caches, and the texts that come of it.

Axes: B sequences, D model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from unimm.generation.kv_cache import KVCache, allocate_kv_buffer, check_max_positions
from unimm.generation.noise import seeded_generators
from unimm.generation.step_graphs import StepGraphs
from unimm.generation.text_sampling import TextSampling, sample_token
from unimm.kernels import AttentionMask, KeyRange
from unimm.kernels.dispatch import device_type, resolve_backend
from unimm.nn.decoder import CausalDecoder


class DecodeSession:
    """The state of decoding after several KV caches: up to `capacity` new rows behind each, in one buffer.

    The rows belong to the decoder's first expert. On a CPU the buffer is in float32: attention of one row takes four
    times as long there in bfloat16 (600 keys, 2 samples, 16 heads of 128: 25 ms against 6). Raises ValueError where the
    rows would reach a position beyond the decoder's last.
    """

    def __init__(self, decoder: CausalDecoder, caches: Sequence[KVCache], capacity: int):
        check_max_positions(decoder.config, max(cache.next_position for cache in caches) + capacity)
        self.decoder = decoder
        self.capacity = capacity
        self.n_written = 0
        dtype = decoder.embed.weight.dtype
        self.device = decoder.embed.weight.device
        wide = torch.promote_types(dtype, torch.float32) if device_type(decoder.embed.weight) == "cpu" else dtype
        self.buffer = allocate_kv_buffer(decoder, caches, [capacity] * len(caches), dtype=wide)
        # the lengths of the caches are a tensor to the decode kernel alone
        backend = resolve_backend("attention", self.buffer.buffer[0, 0])
        self.graphs = StepGraphs(decoder, unless=backend != "triton")
        self._full_mask: AttentionMask | None = None
        self.prefix_lengths = [cache.length for cache in caches]
        self.rows_by_expert = {decoder.config.experts[0]: torch.arange(len(caches), device=self.device)}
        # of all steps at once: [capacity, B]
        steps = torch.arange(capacity, device=self.device)[:, None]
        self.position_ids = steps + torch.tensor([cache.next_position for cache in caches], device=self.device)
        ends = [start + n for start, n in zip(self.buffer.starts, self.prefix_lengths, strict=True)]
        self.buffer_slots = steps + torch.tensor(ends, device=self.device)

    def append(self, x: Tensor) -> Tensor:
        """Append one row to each sequence, x [B, D] -> its last hidden states [B, D], before the final norm.

        Raises ValueError where the session is full.
        """
        n = self.n_written
        if n == self.capacity:
            raise ValueError(f"this session holds {n} new rows of each sequence and is full: give it more capacity")
        self.n_written += 1
        if self.graphs.is_on:
            return self.graphs.run("step", self._static_step, x, self.position_ids[n], self.buffer_slots[n])
        return self._run_decoder(x, self.position_ids[n], self.buffer_slots[n], self._mask(n + 1))

    def _mask(self, n: int) -> AttentionMask:
        """Rows that attend to their prefixes and to n new rows behind each."""
        return AttentionMask(
            [[KeyRange(length + n)] for length in self.prefix_lengths],
            query_lengths=[1] * len(self.prefix_lengths),
            key_starts=self.buffer.starts,
            device=self.device,
        )

    def _run_decoder(self, x: Tensor, position_ids: Tensor, slots: Tensor, mask: AttentionMask) -> Tensor:
        attend = self.buffer.attend_at_slots(slots, mask)
        (hidden,) = self.decoder(x, position_ids, self.rows_by_expert, attend).values()
        return hidden

    def _static_step(self, x: Tensor, position_ids: Tensor, slots: Tensor) -> Tensor:
        """The same step for every number of rows: how many keys there are, the kernel reads from a tensor.

        To the mask all rows of the buffer are visible, so that all steps have one shape; the lengths that the decode
        kernel reads from it are overwritten, by what each slot says.
        """
        if self._full_mask is None:
            self._full_mask = self._mask(self.capacity)
        ranges = self._full_mask.decode_ranges
        assert ranges is not None, "every sample has one row"
        starts, lengths = ranges
        lengths.copy_(slots - starts + 1)
        return self._run_decoder(x, position_ids, slots, self._full_mask)

    def step(self, ids: Tensor) -> Tensor:
        """Append one token to each sequence, ids [B] -> the logits of the next ones [B, V]."""
        return self.decoder.logits(self.append(self.decoder.embed(ids)))


def decode_text(
    session: DecodeSession,
    first: Sequence[int],
    *,
    end: int | Sequence[int],
    sampling: TextSampling,
    seeds: Sequence[int],
) -> Iterator[list[int | None]]:
    """The ids after a `first` id of each sequence, until `end` (one of several) or the token limit of `sampling`.

    Yields one id per sequence at a time, None for those that have ended.
    """

    @torch.inference_mode()
    def step(ids: list[int]) -> Tensor:
        return session.step(torch.tensor(ids, device=session.device))

    return sampling_loop(step, list(first), end=end, sampling=sampling, seeds=seeds)


def sampling_loop(
    step: Callable[[list[int]], Tensor],
    first: list[int],
    *,
    end: int | Sequence[int],
    sampling: TextSampling,
    seeds: Sequence[int],
) -> Iterator[list[int | None]]:
    """Feed ids and sample the next, until every row has sampled `end` (one of several) or the token limit is reached.

    step(ids [B]) -> logits [B, V] after these ids. Yields one id per row, None for a row that has ended; the caller may
    stop early by closing the iterator.
    """
    generators = seeded_generators(seeds)
    ends = {end} if isinstance(end, int) else set(end)
    ids = first
    done = [False] * len(first)
    for _ in range(sampling.token_limit):
        ids = sample_token(step(ids), sampling, generators)
        done = [ended or sampled in ends for ended, sampled in zip(done, ids, strict=True)]
        if all(done):
            return
        yield [None if ended else sampled for ended, sampled in zip(done, ids, strict=True)]


class TextStream:
    """Sampled ids of several rows as texts, whole or in pieces, each cut at the first stop string."""

    def __init__(
        self, steps: Iterator[list[int | None]], decode: Callable[[list[int]], str], rows: int, stop: tuple[str, ...]
    ):
        self.steps = steps
        self.decode = decode
        self.rows = rows
        self.stop = stop

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
        """The text of a single row as it grows, without what may still change: half a character, half a stop string."""
        ids: list[int] = []
        text = ""
        n_given = 0
        n_held = max((len(stop) for stop in self.stop), default=0)
        for (one,) in self.steps:
            ids += [] if one is None else [one]
            text = self.decode(ids)
            if self._truncate_at_stop(text) != text:
                break
            n_safe = len(text) - n_held
            if n_safe > n_given and not text.endswith("\ufffd"):
                yield text[n_given:n_safe]
                n_given = n_safe
        if rest := self._truncate_at_stop(text)[n_given:]:
            yield rest

    def _truncate_at_stop(self, text: str) -> str:
        return text[: min((text.index(stop) for stop in self.stop if stop in text), default=len(text))]
