"""Prefill: parts appended to KV caches in one packed forward."""

from collections.abc import Sequence

import torch

from unimm.generation.causal_lm import Speaker, check_position
from unimm.generation.kv_cache import Context, cache_of
from unimm.sequence.packing import pack
from unimm.sequence.parts import Item


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
