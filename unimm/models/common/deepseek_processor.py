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
from unimm.processing.chat_templates import DEFAULT_SYSTEM_PROMPT, TemplateMessage, apply_chat_template
from unimm.processing.images.deepseek_vl import DeepseekVLImageProcessor
from unimm.processing.images.io import load_image
from unimm.processing.requests import ImageInput, Message, parse_images
from unimm.sequence.parts import IGNORE_INDEX, Part, image_part, text_part
from unimm.tokenizers.text import TextTokenizer, encode_marked, hide_markers

IMAGE_PLACEHOLDER = "<image_placeholder>"
# the roles of Janus-Pro, which are tokens of its own; earlier checkpoints spell them out
ROLES, PLAIN_ROLES = ("<|User|>", "<|Assistant|>"), ("User", "Assistant")


@dataclass(frozen=True, kw_only=True)
class JanusSpecialTokens:
    """Ids that the format needs, looked up by their strings: they differ between the releases."""

    bos: int
    eos: int
    pad: int
    boi: int
    eoi: int

    TOKENS: ClassVar = {
        "bos": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "eos": "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "pad": "<\uff5c\u2581pad\u2581\uff5c>",
        "boi": "<begin_of_image>",
        "eoi": "<end_of_image>",
    }


# what no user can say, whether or not a tokenizer.json calls it special
SPECIAL_TOKENS = (*JanusSpecialTokens.TOKENS.values(), IMAGE_PLACEHOLDER, *ROLES)


@dataclass(frozen=True, kw_only=True)
class DeepseekChatConfig:
    """How a checkpoint talks unless told otherwise: the released numbers. A nano brings its own."""

    system: str = DEFAULT_SYSTEM_PROMPT
    template: str = "deepseek"
    max_tokens: int = 512


@dataclass(frozen=True, kw_only=True)
class DeepseekProcessor:
    """Conversations to items. patch: pixels a feature of the tower; special: markers of a checkpoint without tokenizer."""

    tokenizer: TextTokenizer | None
    image_processor: DeepseekVLImageProcessor
    patch_size: int
    chat_config: DeepseekChatConfig
    fallback_special_tokens: JanusSpecialTokens | None = None

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer. Raises ValueError for a checkpoint without one."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: add its tokenizer.json to the folder")
        return self.tokenizer

    @property
    def special_tokens(self) -> JanusSpecialTokens:
        """The ids of the markers. Raises ValueError for a checkpoint without tokenizer, or one that lacks a marker."""
        if self.fallback_special_tokens:
            return self.fallback_special_tokens
        ids = {
            name: found
            for name, token in JanusSpecialTokens.TOKENS.items()
            if (found := self.text_tokenizer.token_id(token)) is not None
        }
        if lost := [token for name, token in JanusSpecialTokens.TOKENS.items() if name not in ids]:
            raise ValueError(
                f"the tokenizer lacks {', '.join(lost)}: expected the special tokens of a Janus checkpoint; "
                "put the tokenizer.json that was released with the weights into the folder"
            )
        return JanusSpecialTokens(**ids)

    @property
    def roles(self) -> tuple[str, str]:
        """What this checkpoint calls the user and the assistant."""
        return ROLES if self.text_tokenizer.token_id(ROLES[0]) is not None else PLAIN_ROLES

    def conversation_parts(self, messages: Sequence[Message], *, system: str | None = None) -> list[Part]:
        """A conversation up to where the assistant speaks: bos, texts, pictures. system: instead of the model's own."""
        template_messages, all_images = [], []
        for message in messages:
            template_message, images = self._template_message(message)
            template_messages.append(template_message)
            all_images += images
        if not template_messages or template_messages[-1].role != self.roles[0]:
            raise ValueError(
                f"got a conversation that ends with {'the assistant' if template_messages else 'nothing'}: expected the user to have "
                "the last word; add a turn of the user's"
            )
        system = self.chat_config.system if system is None else system
        if IMAGE_PLACEHOLDER in system:
            raise ValueError(
                f"got {IMAGE_PLACEHOLDER} in the system prompt: pictures belong to the turns; leave it out"
            )
        return self._to_parts(template_messages, all_images, hide_markers(self.text_tokenizer, system))

    def with_answer(self, messages: Sequence[Message], answer: str) -> list[Part]:
        """A conversation and the assistant's next words, whose ids, and the eos behind them, carry labels."""
        *before, last = self.conversation_parts(messages)
        said = [*self.text_tokenizer.encode(answer), self.special_tokens.eos]
        ids = last.ids.tolist()
        return [*before, text_part([*ids, *said], labels=[*[IGNORE_INDEX] * (len(ids) - 1), *said, IGNORE_INDEX])]

    def generation_parts(self, prompt: str, images: Sequence[ImageInput] = ()) -> list[Part]:
        """A prompt to draw from, its pictures in front, without a system prompt; up to where the picture begins."""
        message, shown = self._template_message({"role": "user", "content": prompt, "images": images})
        return self._to_parts([message], shown, None)

    def und_image_part(self, pixels: Tensor, boundary_ids: tuple[int, int]) -> Part:
        """A picture [3, S, S] between its markers."""
        seen = (
            self.image_processor.size // self.patch_size * self.patch_size
        )  # what is left of a patch at the edges, no tower sees
        tokens = patchify(pixels[:, :seen, :seen], self.patch_size)
        return image_part("und_image", tokens, torch.arange(len(tokens)), boundary_ids=boundary_ids, causal=True)

    def _template_message(self, message: Message) -> tuple[TemplateMessage, list[ImageInput]]:
        names = dict(zip(("user", "assistant"), self.roles, strict=True))
        known = isinstance(message, Mapping) and message.keys() <= {"role", "content", "images"}
        if not known or message.get("role") not in names or not isinstance(message.get("content"), str):
            raise ValueError(
                f"got the turn {message!r}: expected a dict of role ('user' or 'assistant'), content (a text), and perhaps images"
            )
        content, (images,) = message["content"], parse_images(message.get("images"), "")
        if not content.strip():
            raise ValueError(f"got an empty prompt: expected at least a word from the {message['role']}")
        if IMAGE_PLACEHOLDER not in content:
            content = f"{IMAGE_PLACEHOLDER}\n" * len(images) + content
        if (places := content.count(IMAGE_PLACEHOLDER)) != len(images):
            raise ValueError(
                f"got {places} {IMAGE_PLACEHOLDER} for {len(images)} pictures: expected one for each; give as many pictures, or "
                "leave the placeholders out to have the pictures in front"
            )
        return TemplateMessage(
            names[message["role"]], hide_markers(self.text_tokenizer, content, but=[IMAGE_PLACEHOLDER])
        ), images

    def _to_parts(
        self, messages: Sequence[TemplateMessage], images: Sequence[ImageInput], system: str | None
    ) -> list[Part]:
        """Messages, and an empty one for the assistant to fill, with a picture at each placeholder: bos first."""
        markers, items = self.special_tokens, []
        asked = [*messages, TemplateMessage(self.roles[1], "")]
        for i, piece in enumerate(
            apply_chat_template(asked, system=system, template=self.chat_config.template).split(IMAGE_PLACEHOLDER)
        ):
            ids = encode_marked(self.text_tokenizer, piece)
            if i == 0:
                ids = [markers.bos, *ids]
            if ids:
                items.append(text_part(ids))
            if i < len(images):
                items.append(
                    self.und_image_part(
                        self.image_processor.preprocess(load_image(images[i])), (markers.boi, markers.eoi)
                    )
                )
        return items


def padded_unconditional(prompt: Sequence[Part], pad: int) -> list[Part]:
    """The prompt that guidance compares with: as long, pads between the first and the last id."""
    length = sum(item.segment.length for item in prompt)
    first, last = int(prompt[0].ids[0]), int(prompt[-1].ids[-1])
    return [text_part([first, *[pad] * (length - 2), last])]
