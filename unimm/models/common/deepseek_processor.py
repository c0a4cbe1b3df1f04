"""What a conversation with pictures is in the sequence: texts in DeepSeek's format, pictures between their markers.

Made without the model, so that training can make its batches ahead. docs/originals/janus.md, "Tokenizer" and "Image
processor".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unimm.nn.patches import patchify
from unimm.processing.chat_templates import DEFAULT_SYSTEM, Message, format_conversation
from unimm.processing.images.deepseek_vl import PadSquare
from unimm.processing.images.io import open_image
from unimm.processing.requests import Picture, Turn, pictures_of
from unimm.sequence.parts import IGNORE, Item, image_item, text_item
from unimm.tokenizers.text import TextTokenizer, encode_marked, hide_markers

PLACEHOLDER = "<image_placeholder>"
# the roles of Janus-Pro, which are tokens of its own; earlier checkpoints spell them out
ROLES, OLD_ROLES = ("<|User|>", "<|Assistant|>"), ("User", "Assistant")


@dataclass(frozen=True, kw_only=True)
class Markers:
    """Ids that the format needs, looked up by their strings: they differ between the releases."""

    bos: int
    eos: int
    pad: int
    boi: int
    eoi: int

    STRINGS: ClassVar = {
        "bos": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "eos": "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "pad": "<\uff5c\u2581pad\u2581\uff5c>",
        "boi": "<begin_of_image>",
        "eoi": "<end_of_image>",
    }


# what no user can say, whether or not a tokenizer.json calls it special
UNSPEAKABLE = (*Markers.STRINGS.values(), PLACEHOLDER, *ROLES)


@dataclass(frozen=True, kw_only=True)
class Talk:
    """How a checkpoint talks unless told otherwise: the released numbers. A nano brings its own."""

    system: str = DEFAULT_SYSTEM
    template: str = "deepseek"
    max_tokens: int = 512


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Conversations to items. patch: pixels a feature of the tower; special: markers of a checkpoint without tokenizer."""

    tokenizer: TextTokenizer | None
    pixels: PadSquare
    patch: int
    talk: Talk
    special: Markers | None = None

    @property
    def words(self) -> TextTokenizer:
        """The tokenizer. Raises ValueError for a checkpoint without one."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: add its tokenizer.json to the folder")
        return self.tokenizer

    @property
    def markers(self) -> Markers:
        """The ids of the markers. Raises ValueError for a checkpoint without tokenizer, or one that lacks a marker."""
        if self.special:
            return self.special
        ids = {name: found for name, token in Markers.STRINGS.items() if (found := self.words.id(token)) is not None}
        if lost := [token for name, token in Markers.STRINGS.items() if name not in ids]:
            raise ValueError(
                f"the tokenizer lacks {', '.join(lost)}: expected the special tokens of a Janus checkpoint; "
                "put the tokenizer.json that was released with the weights into the folder"
            )
        return Markers(**ids)

    @property
    def roles(self) -> tuple[str, str]:
        """What this checkpoint calls the user and the assistant."""
        return ROLES if self.words.id(ROLES[0]) is not None else OLD_ROLES

    def conversation(self, turns: Sequence[Turn], *, system: str | None = None) -> list[Item]:
        """A conversation up to where the assistant speaks: bos, texts, pictures. system: instead of the model's own."""
        messages, shown = [], []
        for turn in turns:
            message, images = self._message(turn)
            messages.append(message)
            shown += images
        if not messages or messages[-1].role != self.roles[0]:
            raise ValueError(
                f"got a conversation that ends with {'the assistant' if messages else 'nothing'}: expected the user to have "
                "the last word; add a turn of the user's"
            )
        system = self.talk.system if system is None else system
        if PLACEHOLDER in system:
            raise ValueError(f"got {PLACEHOLDER} in the system prompt: pictures belong to the turns; leave it out")
        return self._composed(messages, shown, hide_markers(self.words, system))

    def answered(self, turns: Sequence[Turn], answer: str) -> list[Item]:
        """A conversation and the assistant's next words, whose ids, and the eos behind them, carry labels."""
        *before, last = self.conversation(turns)
        said = [*self.words.encode(answer), self.markers.eos]
        ids = last.ids.tolist()
        return [*before, text_item([*ids, *said], labels=[*[IGNORE] * (len(ids) - 1), *said, IGNORE])]

    def drawing(self, prompt: str, images: Sequence[Picture] = ()) -> list[Item]:
        """A prompt to draw from, its pictures in front, without a system prompt; up to where the picture begins."""
        message, shown = self._message({"role": "user", "content": prompt, "images": images})
        return self._composed([message], shown, None)

    def looked_at(self, pixels: Tensor, markers: tuple[int, int]) -> Item:
        """A picture [3, S, S] between its markers."""
        seen = self.pixels.size // self.patch * self.patch  # what is left of a patch at the edges, no tower sees
        tokens = patchify(pixels[:, :seen, :seen], self.patch)
        return image_item("look", tokens, torch.arange(len(tokens)), markers=markers, causal=True)

    def _message(self, turn: Turn) -> tuple[Message, list[Picture]]:
        names = dict(zip(("user", "assistant"), self.roles, strict=True))
        known = isinstance(turn, Mapping) and turn.keys() <= {"role", "content", "images"}
        if not known or turn.get("role") not in names or not isinstance(turn.get("content"), str):
            raise ValueError(
                f"got the turn {turn!r}: expected a dict of role ('user' or 'assistant'), content (a text), and perhaps images"
            )
        content, (images,) = turn["content"], pictures_of(turn.get("images"), "")
        if not content.strip():
            raise ValueError(f"got an empty prompt: expected at least a word from the {turn['role']}")
        if PLACEHOLDER not in content:
            content = f"{PLACEHOLDER}\n" * len(images) + content
        if (places := content.count(PLACEHOLDER)) != len(images):
            raise ValueError(
                f"got {places} {PLACEHOLDER} for {len(images)} pictures: expected one for each; give as many pictures, or "
                "leave the placeholders out to have the pictures in front"
            )
        return Message(names[turn["role"]], hide_markers(self.words, content, but=[PLACEHOLDER])), images

    def _composed(self, messages: Sequence[Message], images: Sequence[Picture], system: str | None) -> list[Item]:
        """Messages, and an empty one for the assistant to fill, with a picture at each placeholder: bos first."""
        markers, items = self.markers, []
        asked = [*messages, Message(self.roles[1], "")]
        for i, piece in enumerate(
            format_conversation(asked, system=system, template=self.talk.template).split(PLACEHOLDER)
        ):
            ids = encode_marked(self.words, piece)
            if i == 0:
                ids = [markers.bos, *ids]
            if ids:
                items.append(text_item(ids))
            if i < len(images):
                items.append(self.looked_at(self.pixels.pixels(open_image(images[i])), (markers.boi, markers.eoi)))
        return items


def unconditional(prompt: Sequence[Item], pad: int) -> list[Item]:
    """The prompt that guidance compares with: as long, pads between the first and the last id."""
    length = sum(item.segment.length for item in prompt)
    first, last = int(prompt[0].ids[0]), int(prompt[-1].ids[-1])
    return [text_item([first, *[pad] * (length - 2), last])]
