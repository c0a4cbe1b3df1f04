"""Chat about pictures: what readers, and Janus and JanusFlow, do with a prompt that their own rules make."""

from collections.abc import Mapping, Sequence
from typing import Any

from unimm.generation.decode import TextStream
from unimm.generation.kv_cache import EMPTY_CACHE, KVCache
from unimm.generation.text_sampling import TextSampling
from unimm.processing.requests import ImageInput, Message, expand_seeds, parse_requests
from unimm.sequence.parts import Part, text_part


class MLLMChat:
    """The verbs of a model that answers in words. It brings `prompts`, which make a conversation's items, and `written`."""

    processor: Any
    prefill: Any

    def decode_answer(
        self, prompts: Sequence[list[Part]], text_sampling: TextSampling | None, seed: Sequence[int]
    ) -> TextStream:
        """The assistant's words after each prompt."""
        raise NotImplementedError

    def understand(
        self,
        images: ImageInput | Sequence | None,
        question: str | Sequence[str],
        *,
        stream: bool = False,
        text_sampling: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about pictures: a str; for a batch of questions a list; with `stream`, pieces as they come.

        images: for one question a picture, several, or None; for a batch one of these each. They stand before the
        question, or where it says the placeholder of the model's prompts. Raises ValueError for bad input.
        """
        questions, shown = parse_requests(question, images)
        talks = [[{"role": "user", "content": q, "images": some}] for q, some in zip(questions, shown, strict=True)]
        return self.chat(
            talks[0] if isinstance(question, str) else talks, stream=stream, text_sampling=text_sampling, seed=seed
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        system: str | None = None,
        stream: bool = False,
        text_sampling: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Go on with a conversation of several turns, or with a batch of conversations: the assistant's next words.

        A turn is {"role": "user" or "assistant", "content": str, "images": [pictures]}, images where there are some; the
        last one is the user's. system: instead of the model's own system prompt. Returns a str, a list of them for a batch,
        or (`stream`) pieces as they come. Raises ValueError for bad input.
        """
        if not messages or isinstance(messages, Mapping):
            raise ValueError(f"got {messages!r} for a conversation: expected a list of turns, the last one the user's")
        single = isinstance(messages[0], Mapping)
        batch: list[Any] = [messages] if single else list(messages)
        if stream and len(batch) != 1:
            raise ValueError(f"got {len(batch)} conversations to stream: expected one")
        items = [self.processor.conversation_parts(one, system=system) for one in batch]
        written = self.decode_answer(items, text_sampling, expand_seeds(seed, len(batch)))
        if stream:
            return written.pieces()
        return written.texts()[0] if single else written.texts()

    def prefill_prompts(self, prompts: Sequence[list[Part]]) -> tuple[list[KVCache], list[int]]:
        """Contexts of all but the last id of each prompt, which ends with a text, and those last ids."""
        before = [[*items[:-1], *(text_part(ids) for ids in [items[-1].ids[:-1].tolist()] if ids)] for items in prompts]
        return self.prefill([EMPTY_CACHE] * len(before), before), [int(items[-1].ids[-1]) for items in prompts]
