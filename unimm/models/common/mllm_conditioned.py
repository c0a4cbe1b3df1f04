"""The base of MetaQuery and UniWorld: image generation conditioned on a frozen MLLM, which itself answers in words."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unimm.generation.decode import DecodeSession
from unimm.generation.kv_cache import KVCache
from unimm.generation.text_sampling import TextSampling
from unimm.models.base import UnifiedModel
from unimm.processing.requests import ImageInput, Message
from unimm.sequence.parts import Part
from unimm.vlms.base import VisionLanguageModel


class MLLMConditionedModel(UnifiedModel):
    """A model around a frozen MLLM: its `understand`, `chat`, `prefill` and `decode_step` are the MLLM's."""

    @property
    @abstractmethod
    def chat_mllm(self) -> VisionLanguageModel:
        """The frozen MLLM, with its language head."""

    def understand(
        self,
        images: ImageInput | Sequence | None,
        question: str | Sequence[str],
        *,
        stream: bool = False,
        text_sampling: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about images, exactly as the frozen MLLM does: see its `understand`."""
        return self.chat_mllm.understand(images, question, stream=stream, text_sampling=text_sampling, seed=seed)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        system: str | None = None,
        stream: bool = False,
        text_sampling: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer the last message of a conversation, or of a batch of them, exactly as the frozen MLLM does: see its
        `chat`."""
        return self.chat_mllm.chat(messages, system=system, stream=stream, text_sampling=text_sampling, seed=seed)

    # ---- the MLLM's steps

    def prefill(self, caches: Sequence[KVCache], parts: Sequence[Sequence[Part]]) -> list[KVCache]:
        """Append parts to each KV cache, all in one packed forward of the MLLM."""
        return self.chat_mllm.prefill(caches, parts)

    def decode_session(self, caches: Sequence[KVCache], capacity: int) -> DecodeSession:
        """The state of decoding up to `capacity` tokens after each cache."""
        return self.chat_mllm.decode_session(caches, capacity)

    def decode_step(self, session: DecodeSession, ids: Tensor) -> Tensor:
        """Append one token to each sequence of a session, ids [B] -> the logits of the next ones [B, V]."""
        return self.chat_mllm.decode_step(session, ids)
