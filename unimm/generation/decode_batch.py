"""Continuous batching of decoding: rows join and leave between the steps, each behind a KV cache of its own.

Axes: B rows, M rows of a buffer, G key/value heads, K head, D model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unimm.generation.kv_cache import KVCache, attend_in_buffer, check_max_positions
from unimm.kernels import AttentionMask, KeyRange
from unimm.kernels.dispatch import device_type
from unimm.nn.decoder import CausalDecoder, DecoderSizes


@dataclass(eq=False)
class DecodeRow:
    """A sequence that is decoded: where it lies in the buffer, and how far it is."""

    start: int  # the row of the buffer where its keys and values begin
    prefix_length: int
    next_position: int
    capacity: int  # new rows that it may have
    n_written: int = 0

    @property
    def n_reserved(self) -> int:
        """The rows of the buffer that belong to it."""
        return self.prefix_length + self.capacity


class DecodeBatch:
    """Sequences that are decoded together, each at a step of its own, in one buffer in which their places are reserved.

    The rows belong to the decoder's first expert. As in a DecodeSession the buffer of a CPU is in float32. It grows when
    a sequence does not fit, and is given back when the last one leaves.
    """

    def __init__(self, decoder: CausalDecoder):
        self.decoder = decoder
        self.rows: list[DecodeRow] = []
        weight = decoder.embed.weight
        self.device = weight.device
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.dtype = wide if device_type(weight) == "cpu" else weight.dtype
        self.buffer = self._allocate(0)

    def _allocate(self, n_rows: int) -> Tensor:
        config = self.decoder.config
        # zeros, since the reference attention also reads unwritten rows, and 0 * nan is nan
        shape = config.n_layers, 2, n_rows, self.decoder.n_cached_heads, config.head_dim
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def join(self, cache: KVCache, capacity: int) -> DecodeRow:
        """Add a sequence behind a cache, with room for `capacity` new rows.

        Raises ValueError where it would reach a position beyond the decoder's last.
        """
        check_max_positions(self.decoder.config, cache.next_position + capacity)
        row = DecodeRow(0, cache.length, cache.next_position, capacity)
        row.start = self._find_room(row.n_reserved)
        if cache.chunks:
            self.buffer[:, :, row.start : row.start + cache.length] = torch.cat(cache.chunks, 2)
        self.rows.append(row)
        return row

    def leave(self, row: DecodeRow) -> None:
        """Give a sequence's place back."""
        self.rows.remove(row)
        if not self.rows:
            self.buffer = self._allocate(0)

    def _find_room(self, n: int) -> int:
        """Where n free rows begin: the first gap that is long enough, or the end of the buffer, which grows."""
        end = 0
        for row in sorted(self.rows, key=lambda one: one.start):
            if row.start - end >= n:
                return end
            end = row.start + row.n_reserved
        if end + n > self.buffer.shape[2]:
            grown = self._allocate(max(end + n, 2 * self.buffer.shape[2]))
            grown[:, :, : self.buffer.shape[2]] = self.buffer
            self.buffer = grown
        return end

    def append(self, rows: Sequence[DecodeRow], x: Tensor) -> Tensor:
        """Append one row to each of some sequences, x [B, D] -> their last hidden states [B, D], before the final norm.

        Raises ValueError where a sequence is full.
        """
        if full := [row for row in rows if row.n_written == row.capacity]:
            raise ValueError(f"a sequence holds {full[0].capacity} new rows and is full: give it more capacity")
        mask = AttentionMask(
            [[KeyRange(row.prefix_length + row.n_written + 1)] for row in rows],
            query_lengths=[1] * len(rows),
            key_starts=[row.start for row in rows],
            device=self.device,
        )
        slots = torch.tensor([row.start + row.prefix_length + row.n_written for row in rows], device=self.device)
        position_ids = torch.tensor([row.next_position + row.n_written for row in rows], device=self.device)
        rows_by_expert = {self.decoder.config.experts[0]: torch.arange(len(rows), device=self.device)}
        attend = attend_in_buffer(self.buffer, slots, mask)
        (hidden,) = self.decoder(x, position_ids, rows_by_expert, attend).values()
        for row in rows:
            row.n_written += 1
        return hidden

    def step(self, rows: Sequence[DecodeRow], ids: Sequence[int]) -> Tensor:
        """Append one token to each of some sequences, ids [B] -> the logits of the next ones [B, V]."""
        x = self.decoder.embed(torch.tensor(ids, device=self.device))
        return self.decoder.logits(self.append(rows, x))


def kv_row_bytes(config: DecoderSizes, dtype: torch.dtype) -> int:
    """The bytes of one row's keys and values in all layers."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize
