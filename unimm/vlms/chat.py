"""Chat about pictures: what readers, and Janus and JanusFlow, do with a prompt that their own rules make."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from unimm.generation.causal_lm import Speaker
from unimm.generation.decode import TextStream
from unimm.generation.kv_cache import EMPTY, Context
from unimm.generation.prefill import extend
from unimm.generation.text_sampling import TextSampling
from unimm.processing.requests import Picture, Turn, asked, seeds
from unimm.sequence.parts import Item, text_item


class Chatting:
    """The verbs of a model that answers in words. It brings `prompts`, which make a conversation's items, and `written`."""

    prompts: Any

    def written(self, prompts: Sequence[list[Item]], sampling: TextSampling | None, seed: Sequence[int]) -> TextStream:
        """The assistant's words after each prompt."""
        raise NotImplementedError

    def understand(
        self,
        images: Picture | Sequence | None,
        question: str | Sequence[str],
        *,
        stream: bool = False,
        text: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about pictures: a str; for a batch of questions a list; with `stream`, pieces as they come.

        images: for one question a picture, several, or None; for a batch one of these each. They stand before the
        question, or where it says the placeholder of the model's prompts. Raises ValueError for bad input.
        """
        questions, shown = asked(question, images)
        talks = [[{"role": "user", "content": q, "images": some}] for q, some in zip(questions, shown, strict=True)]
        return self.chat(talks[0] if isinstance(question, str) else talks, stream=stream, text=text, seed=seed)

    def chat(
        self,
        turns: Sequence[Turn] | Sequence[Sequence[Turn]],
        *,
        system: str | None = None,
        stream: bool = False,
        text: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Go on with a conversation of several turns, or with a batch of conversations: the assistant's next words.

        A turn is {"role": "user" or "assistant", "content": str, "images": [pictures]}, images where there are some; the
        last one is the user's. system: instead of the model's own system prompt. Returns a str, a list of them for a batch,
        or (`stream`) pieces as they come. Raises ValueError for bad input.
        """
        if not turns or isinstance(turns, Mapping):
            raise ValueError(f"got {turns!r} for a conversation: expected a list of turns, the last one the user's")
        single = isinstance(turns[0], Mapping)
        batch: list[Any] = [turns] if single else list(turns)
        if stream and len(batch) != 1:
            raise ValueError(f"got {len(batch)} conversations to stream: expected one")
        items = [self.prompts.conversation(one, system=system) for one in batch]
        written = self.written(items, text, seeds(seed, len(batch)))
        if stream:
            return written.pieces()
        return written.texts()[0] if single else written.texts()

    def prefilled(self, prompts: Sequence[list[Item]]) -> tuple[list[Context], list[int]]:
        """Contexts of all but the last id of each prompt, which ends with a text, and those last ids."""
        before = [[*items[:-1], *(text_item(ids) for ids in [items[-1].ids[:-1].tolist()] if ids)] for items in prompts]
        return extend(cast("Speaker", self), [EMPTY] * len(before), before), [
            int(items[-1].ids[-1]) for items in prompts
        ]
