"""Prefill: parts appended to KV caches in one packed forward."""

from collections.abc import Sequence

import torch

from unimm.generation.causal_lm import CausalLM, check_max_positions
from unimm.generation.kv_cache import KVCache, allocate_kv_buffer
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import Part


@torch.inference_mode()
def prefill(model: CausalLM, caches: Sequence[KVCache], parts: Sequence[Sequence[Part]]) -> list[KVCache]:
    """Append items to each context, all in one packed forward; the contexts given stay as they are.

    Raises ValueError where a context would outgrow the positions that the model knows.
    """
    lengths = [sum(item.segment.length for item in more) for more in parts]
    if not any(lengths):
        return list(caches)
    cache = allocate_kv_buffer(model, caches, lengths)
    past = [cache.prefix(i) for i in range(len(caches))]
    batch = pack_sequences(parts, past, device=model.device)
    check_max_positions(model, max(batch.layout.next_positions))
    model.backbone(batch, cache.attend(past, batch.layout.mask))
    return [
        c.appended(cache.copy_new_rows(i, lengths[i]), batch.layout.next_positions[i]) for i, c in enumerate(caches)
    ]
