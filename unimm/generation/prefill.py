"""Prefill: parts appended to KV caches in one packed forward."""

from collections.abc import Sequence
from dataclasses import dataclass

from unimm.generation.kv_cache import KVBuffer, KVCache, allocate_kv_buffer, check_fits
from unimm.nn.decoder import AttentionFn, CausalDecoder
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import Part


@dataclass(frozen=True, eq=False)
class PrefillPlan:
    """A forward that appends parts to KV caches: run a backbone on `batch` with `attend`, then read `caches`."""

    buffer: KVBuffer
    batch: PackedBatch
    attend: AttentionFn

    def caches(self) -> list[KVCache]:
        """The extended caches, once the forward has run; the ones that were given stay as they are."""
        layout = self.batch.layout
        return [
            cache.appended(self.buffer.copy_new_rows(i, layout.lengths[i]), layout.next_positions[i])
            for i, cache in enumerate(self.buffer.caches)
        ]


def plan_prefill(decoder: CausalDecoder, caches: Sequence[KVCache], parts: Sequence[Sequence[Part]]) -> PrefillPlan:
    """Pack the new parts of every cache behind it, in one buffer.

    Raises ValueError where a sequence would reach a position beyond the decoder's last.
    """
    check_fits(decoder.config, parts, caches=caches)
    lengths = [sum(part.segment.length for part in new) for new in parts]
    buffer = allocate_kv_buffer(decoder, caches, lengths)
    prefixes = [buffer.prefix(i) for i in range(len(caches))]
    batch = pack_sequences(parts, prefixes, device=decoder.embed.weight.device)
    return PrefillPlan(buffer, batch, buffer.attend(prefixes, batch.layout.mask))
