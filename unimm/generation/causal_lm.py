"""The steps of a causal language model that generation and a server are built on: prefill and decode_step."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from unimm.generation.decode import DecodeSession
from unimm.generation.kv_cache import EMPTY_CACHE, KVCache
from unimm.generation.prefill import plan_prefill
from unimm.nn.decoder import AttentionFn, CausalDecoder, RowsByExpert
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import Part


class CausalLM(nn.Module, ABC):
    """A network around a causal decoder. The caller holds the state: KV caches, and the session of a decoding."""

    decoder: CausalDecoder

    @abstractmethod
    def backbone(self, batch: PackedBatch, attend: AttentionFn) -> RowsByExpert:
        """The last hidden states of every row of a batch, by expert, before the final norms."""

    @property
    def device(self) -> torch.device:
        """The device of the decoder."""
        return self.decoder.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder."""
        return self.decoder.embed.weight.dtype

    @torch.inference_mode()
    def prefill(self, caches: Sequence[KVCache], parts: Sequence[Sequence[Part]]) -> list[KVCache]:
        """Append parts to each cache, all in one packed forward; the caches given stay as they are.

        Raises ValueError where a sequence would reach a position beyond the decoder's last.
        """
        if not any(part.segment.length for new in parts for part in new):
            return list(caches)
        plan = plan_prefill(self.decoder, caches, parts)
        self.backbone(plan.batch, plan.attend)
        return plan.caches()

    def prefill_unique(self, prompts: Sequence[Sequence[Part]], keys: Sequence[Hashable]) -> list[KVCache]:
        """The KV cache of each prompt; prompts of equal keys are computed once."""
        unique = dict(zip(keys, prompts, strict=True))
        caches = self.prefill([EMPTY_CACHE] * len(unique), list(unique.values()))
        by_key = dict(zip(unique, caches, strict=True))
        return [by_key[key] for key in keys]

    def decode_session(self, caches: Sequence[KVCache], capacity: int) -> DecodeSession:
        """The state of decoding up to `capacity` tokens after each cache."""
        return DecodeSession(self.decoder, caches, capacity)

    @torch.inference_mode()
    def decode_step(self, session: DecodeSession, ids: Tensor) -> Tensor:
        """Append one token to each sequence of a session, ids [B] -> the logits of the next ones [B, V]."""
        return session.step(ids)
