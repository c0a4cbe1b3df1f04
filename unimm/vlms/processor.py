"""What a conversation with pictures is in a reader's sequence, whichever reader it is.

Made without the model, so that training can make its batches ahead.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from unimm.processing.requests import ImageInput, Message, parse_images
from unimm.sequence.parts import IGNORE_INDEX, Part, text_part
from unimm.tokenizers.text import TextTokenizer, hide_markers

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("user", "assistant")


@dataclass(frozen=True, kw_only=True)
class VLMProcessor:
    """Conversations to items."""

    tokenizer: TextTokenizer | None
    special_tokens: Any  # the family's; `end` is the id behind an answer

    IMAGE_PLACEHOLDER: ClassVar[str]  # where a picture belongs

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer. Raises ValueError for a checkpoint without one."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: add its tokenizer.json to the folder")
        return self.tokenizer

    def conversation_parts(self, messages: Sequence[Message], *, system: str | None = None) -> list[Part]:
        """A conversation up to where the assistant speaks. system: instead of the released one; "" for none.

        Pictures stand in front of their turn's text, or where it says `PLACEHOLDER`. Raises ValueError for bad input.
        """
        text, shown = self.render(messages, system=system)
        return self.composed(text, shown)

    def with_answer(self, messages: Sequence[Message], answer: str, *, system: str | None = None) -> list[Part]:
        """A conversation and the assistant's next words, whose ids, and the end behind them, carry labels."""
        *before, last = self.conversation_parts(messages, system=system)
        said, ids = [*self.text_tokenizer.encode(answer), self.special_tokens.im_end], last.ids.tolist()
        return [*before, text_part([*ids, *said], labels=[*[IGNORE_INDEX] * (len(ids) - 1), *said, IGNORE_INDEX])]

    @abstractmethod
    def render(self, messages: Sequence[Message], *, system: str | None = None) -> tuple[str, list[ImageInput]]:
        """The text of a conversation, for `composed`, and its pictures; a caller may add to the text."""

    @abstractmethod
    def composed(self, text: str, images: Sequence[ImageInput]) -> list[Part]:
        """A text in which markers are markers, with a `PLACEHOLDER` for each picture, as items."""

    def message_content(self, message: Message) -> tuple[str, list[ImageInput]]:
        """A turn's text with a `PLACEHOLDER` for each picture, in front unless it says where; and its pictures."""
        known = isinstance(message, Mapping) and message.keys() <= {"role", "content", "images"}
        if not known or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(
                f"got the turn {message!r}: expected a dict of role ('user' or 'assistant'), content (a text), and perhaps images"
            )
        content, (images,) = message["content"], parse_images(message.get("images"), "")
        if not content.strip():
            raise ValueError(f"got an empty prompt: expected at least a word from the {message['role']}")
        if self.IMAGE_PLACEHOLDER not in content:
            content = self.IMAGE_PLACEHOLDER * len(images) + content
        if (places := content.count(self.IMAGE_PLACEHOLDER)) != len(images):
            raise ValueError(
                f"got {places} {self.IMAGE_PLACEHOLDER} for {len(images)} pictures: expected one for each; give as many pictures, or "
                "leave the placeholders out to have the pictures in front"
            )
        return hide_markers(self.text_tokenizer, content, but=[self.IMAGE_PLACEHOLDER]), images


def check_last_role(messages: Sequence[Message]) -> None:
    """Raise ValueError for a conversation that does not end with the user."""
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("got a conversation that does not end with the user: expected the user to have the last word")
