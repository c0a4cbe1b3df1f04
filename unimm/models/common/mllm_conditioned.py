"""What MetaQuery and UniWorld share: a model around a frozen reader speaks with the reader's own voice."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from unimm.generation.text_sampling import TextSampling
from unimm.models.base import UnifiedModel
from unimm.processing.requests import ImageInput, Message
from unimm.vlms.base import VisionLanguageModel


class MLLMConditionedModel(UnifiedModel):
    """A model that draws from what a frozen reader makes of a prompt, and answers as the reader does."""

    @property
    @abstractmethod
    def chat_mllm(self) -> VisionLanguageModel:
        """The frozen reader, whole."""

    def understand(
        self,
        images: ImageInput | Sequence | None,
        question: str | Sequence[str],
        *,
        stream: bool = False,
        text_sampling: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about pictures, exactly as the frozen reader does: see its `understand`."""
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
        """Go on with a conversation, or a batch of them, exactly as the frozen reader does: see its `chat`."""
        return self.chat_mllm.chat(messages, system=system, stream=stream, text_sampling=text_sampling, seed=seed)
