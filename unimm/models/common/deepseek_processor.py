"""Conversations in DeepSeek's chat format as parts: special tokens, roles, image placeholders.

docs/originals/janus.md, "Tokenizer" and "Image processor".
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from unimm.checkpoint.config_io import PositiveInt
from unimm.encoders.timm_vit import TimmEncoderConfig
from unimm.nn.patches import patchify
from unimm.processing.chat_templates import (
    DEFAULT_SYSTEM_PROMPT,
    ChatMessage,
    Prompt,
    TemplateMessage,
    apply_chat_template,
)
from unimm.processing.images.deepseek_vl import DeepseekVLImageProcessor
from unimm.processing.requests import ImageInput
from unimm.sequence.parts import Part, image_part
from unimm.vlms.processor import ChatProcessor, answer_placeholder, with_placeholders

IMAGE_PLACEHOLDER = "<image_placeholder>"
# the roles of Janus-Pro, which are tokens of its own; earlier checkpoints spell them out
ROLES = ("<|User|>", "<|Assistant|>")
PLAIN_ROLES = ("User", "Assistant")


@dataclass(frozen=True, kw_only=True)
class JanusSpecialTokens:
    """The ids of the special tokens, which differ between the releases; `TOKENS` are their strings."""

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


# tokens that are special whether or not a tokenizer.json calls them so, and thus never parsed out of text
SPECIAL_TOKENS = (*JanusSpecialTokens.TOKENS.values(), IMAGE_PLACEHOLDER, *ROLES)


@dataclass(frozen=True, kw_only=True)
class DeepseekChatConfig:
    """The chat defaults of a checkpoint: the released ones, unless its config.json has others under "generation"."""

    system: str = DEFAULT_SYSTEM_PROMPT
    template: str = "deepseek"
    max_tokens: PositiveInt = 512


def check_image_size(image_processor: DeepseekVLImageProcessor, encoder: TimmEncoderConfig) -> None:
    """Raise ValueError where images are prepared in another size than their encoder takes."""
    if image_processor.size != encoder.image_size:
        raise ValueError(
            f"got images of {image_processor.size} pixels a side for a vision encoder of {encoder.image_size}: "
            "expected the same; correct image_size in preprocessor_config.json or in the vision_config"
        )


@dataclass(frozen=True, kw_only=True)
class DeepseekProcessor(ChatProcessor):
    """Conversations in DeepSeek's chat format as parts.

    patch_size: pixels of a patch of the vision encoder. fallback_special_tokens: of a checkpoint without tokenizer.
    """

    image_processor: DeepseekVLImageProcessor
    patch_size: int
    chat_config: DeepseekChatConfig
    fallback_special_tokens: JanusSpecialTokens | None = None

    IMAGE_PLACEHOLDER: ClassVar[str] = IMAGE_PLACEHOLDER
    IMAGE_SEPARATOR: ClassVar[str] = "\n"

    @property
    def special_tokens(self) -> JanusSpecialTokens:
        """The ids of the special tokens. Raises ValueError for a tokenizer that lacks one, or none at all."""
        if self.fallback_special_tokens:
            return self.fallback_special_tokens
        ids = {name: self.text_tokenizer.token_id(token) for name, token in JanusSpecialTokens.TOKENS.items()}
        known = {name: one for name, one in ids.items() if one is not None}
        if lacking := [JanusSpecialTokens.TOKENS[name] for name in ids if name not in known]:
            raise ValueError(
                f"the tokenizer lacks {', '.join(lacking)}: expected the special tokens of a Janus checkpoint; "
                "put the tokenizer.json that was released with the weights into the folder"
            )
        return JanusSpecialTokens(**known)

    @property
    def default_system(self) -> str:
        """The system prompt of the checkpoint."""
        return self.chat_config.system

    @property
    def answer_end_id(self) -> int:
        """The id of the end of a sentence."""
        return self.special_tokens.eos

    @property
    def roles(self) -> dict[str, str]:
        """The names of the user and the assistant in this checkpoint's prompts."""
        names = ROLES if self.text_tokenizer.token_id(ROLES[0]) is not None else PLAIN_ROLES
        return dict(zip(("user", "assistant"), names, strict=True))

    def render(self, messages: Sequence[ChatMessage], system: str) -> Prompt:
        """The prompt of a conversation, up to where the assistant's answer begins. system: "" for none."""
        if IMAGE_PLACEHOLDER in system:
            raise ValueError(
                f"got {IMAGE_PLACEHOLDER} in the system prompt: images belong to the messages; leave it out"
            )
        roles = self.roles
        written = [TemplateMessage(roles[message.role], message.content) for message in messages]
        prompt = apply_chat_template(
            [*written, TemplateMessage(roles["assistant"], "")],
            system=system,
            template=self.chat_config.template,
            special=self.special,
        )
        return [self.special_tokens.bos, *prompt]

    def generation_parts(self, prompt: str, images: Sequence[ImageInput] = ()) -> list[Part]:
        """A prompt to generate an image from, without a system prompt; its own images stand in front of the text."""
        messages = self.parse_messages([{"role": "user", "content": prompt, "images": images}])
        return self.to_parts(self.render(messages, ""))

    def labelled_conversation(
        self, messages: Sequence[ChatMessage], *, learned: Collection[int], system: str | None = None
    ) -> list[Part]:
        """A whole conversation, in which some answers, and the id that ends each, carry labels.

        learned: the places of these messages, which are texts. system: in place of the default one; "" for none. Raises
        ValueError for a chat template that ends no answer with an id of its own.
        """
        roles = self.roles
        written = [
            TemplateMessage(roles[message.role], message.content) for message in with_placeholders(messages, learned)
        ]
        template = self.chat_config.template
        system = self.default_system if system is None else system
        prompt = apply_chat_template(written, system=system, template=template, special=self.special)
        behind = [prompt[prompt.index(answer_placeholder(i)) + 1 :] for i in learned]
        if not all(rest and isinstance(rest[0], int) for rest in behind):
            raise ValueError(f"got the chat template {template!r}, which ends no answer by an id: expected 'deepseek'")
        return self.label_answers([self.special_tokens.bos, *prompt], messages)

    def labelled_texts(self, pieces: Sequence[str | Image.Image]) -> list[Part]:
        """Texts and images in order, without roles; the ids of all texts carry labels, and the one that ends the last."""
        return self.label_texts([self.special_tokens.bos, *pieces])

    def image_prompt(self, image: Image.Image, n_images: int) -> list[str | int | Part]:
        """An RGB image as a part, between the ids that begin and end it."""
        boundary_ids = self.special_tokens.boi, self.special_tokens.eoi
        return [self.und_image_part(self.image_processor.preprocess(image), boundary_ids)]

    def und_image_part(self, pixels: Tensor, boundary_ids: tuple[int, int]) -> Part:
        """A part of pixels [3, S, S], between the ids that begin and end it."""
        # pixels at the right and the bottom edge that fill no patch are left out, as by the encoder's convolution
        side = self.image_processor.size // self.patch_size * self.patch_size
        tokens = patchify(pixels[:, :side, :side], self.patch_size)
        return image_part("und_image", tokens, torch.arange(len(tokens)), boundary_ids=boundary_ids, causal=True)
