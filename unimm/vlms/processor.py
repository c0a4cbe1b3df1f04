"""What a conversation with pictures is in a reader's sequence, whichever reader it is.

Made without the model, so that training can make its batches ahead.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from unimm.processing.requests import Picture, Turn, pictures_of
from unimm.sequence.parts import IGNORE, Item, text_item
from unimm.tokenizers.text import TextTokenizer, hide_markers

START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("user", "assistant")


@dataclass(frozen=True, kw_only=True)
class ReaderPrompts:
    """Conversations to items."""

    tokenizer: TextTokenizer | None
    markers: Any  # the family's; `end` is the id behind an answer

    PLACEHOLDER: ClassVar[str]  # where a picture belongs

    @property
    def words(self) -> TextTokenizer:
        """The tokenizer. Raises ValueError for a checkpoint without one."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: add its tokenizer.json to the folder")
        return self.tokenizer

    def conversation(self, turns: Sequence[Turn], *, system: str | None = None) -> list[Item]:
        """A conversation up to where the assistant speaks. system: instead of the released one; "" for none.

        Pictures stand in front of their turn's text, or where it says `PLACEHOLDER`. Raises ValueError for bad input.
        """
        text, shown = self.template(turns, system=system)
        return self.composed(text, shown)

    def answered(self, turns: Sequence[Turn], answer: str, *, system: str | None = None) -> list[Item]:
        """A conversation and the assistant's next words, whose ids, and the end behind them, carry labels."""
        *before, last = self.conversation(turns, system=system)
        said, ids = [*self.words.encode(answer), self.markers.end], last.ids.tolist()
        return [*before, text_item([*ids, *said], labels=[*[IGNORE] * (len(ids) - 1), *said, IGNORE])]

    @abstractmethod
    def template(self, turns: Sequence[Turn], *, system: str | None = None) -> tuple[str, list[Picture]]:
        """The text of a conversation, for `composed`, and its pictures; a caller may add to the text."""

    @abstractmethod
    def composed(self, text: str, pictures: Sequence[Picture]) -> list[Item]:
        """A text in which markers are markers, with a `PLACEHOLDER` for each picture, as items."""

    def content(self, turn: Turn) -> tuple[str, list[Picture]]:
        """A turn's text with a `PLACEHOLDER` for each picture, in front unless it says where; and its pictures."""
        known = isinstance(turn, Mapping) and turn.keys() <= {"role", "content", "images"}
        if not known or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise ValueError(
                f"got the turn {turn!r}: expected a dict of role ('user' or 'assistant'), content (a text), and perhaps images"
            )
        content, (images,) = turn["content"], pictures_of(turn.get("images"), "")
        if not content.strip():
            raise ValueError(f"got an empty prompt: expected at least a word from the {turn['role']}")
        if self.PLACEHOLDER not in content:
            content = self.PLACEHOLDER * len(images) + content
        if (places := content.count(self.PLACEHOLDER)) != len(images):
            raise ValueError(
                f"got {places} {self.PLACEHOLDER} for {len(images)} pictures: expected one for each; give as many pictures, or "
                "leave the placeholders out to have the pictures in front"
            )
        return hide_markers(self.words, content, but=[self.PLACEHOLDER]), images


def user_is_last(turns: Sequence[Turn]) -> None:
    """Raise ValueError for a conversation that does not end with the user."""
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("got a conversation that does not end with the user: expected the user to have the last word")
