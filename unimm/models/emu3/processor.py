"""Emu3's sequences: texts and images as ids of one vocabulary.

An image is its grid as text between two ids, then its codes row by row, each row ended by an id.
docs/originals/emu3.md, "Prompts".
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image
from torch import Tensor

from unimm.models.emu3.config import Emu3ChatConfig
from unimm.models.emu3.image_processor import Emu3ImageProcessor
from unimm.models.emu3.text_tokenizer import Emu3SpecialTokens
from unimm.processing.chat_templates import ChatMessage, Prompt
from unimm.processing.requests import ImageInput
from unimm.sequence.parts import Part
from unimm.vlms.processor import ChatProcessor, with_placeholders

IMAGE_PLACEHOLDER = "<image>"

CodesOfImage = Callable[[Tensor], Tensor]  # normalised values [3, H, W] -> codes [h, w]


@dataclass(frozen=True, kw_only=True)
class Emu3Processor(ChatProcessor):
    """Conversations, and prompts to generate from, as ids. encode_image: the vision tokenizer."""

    special_tokens: Emu3SpecialTokens
    image_processor: Emu3ImageProcessor
    chat_config: Emu3ChatConfig
    encode_image: CodesOfImage

    IMAGE_PLACEHOLDER: ClassVar[str] = IMAGE_PLACEHOLDER

    @property
    def default_system(self) -> str:
        """The system prompt of the checkpoint."""
        return self.chat_config.system

    @property
    def answer_end_id(self) -> int:
        """The id that ends a sequence."""
        return self.special_tokens.eos

    def image_start(self, grid: tuple[int, int]) -> list[str | int]:
        """What stands before the codes of an image of a grid (h, w)."""
        return [self.special_tokens.boi, f"{grid[0]}*{grid[1]}", self.special_tokens.img]

    def image_ids(self, codes: Tensor) -> list[int]:
        """Codes [h, w] as ids, a row behind the other, and what ends the image."""
        special = self.special_tokens
        rows = [[*(special.code0 + code for code in row), special.eol] for row in codes.tolist()]
        return [one for row in rows for one in row] + [special.eof, special.eoi]

    def codes_prompt(self, codes: Tensor) -> list[str | int]:
        """An image of codes [h, w] in a prompt."""
        return [*self.image_start((codes.shape[0], codes.shape[1])), *self.image_ids(codes)]

    def image_prompt(self, image: Image.Image, n_images: int) -> list[str | int | Part]:
        """An RGB image in a prompt. Each is encoded alone: padded to a common size, its codes would be others."""
        return [*self.codes_prompt(self.encode_image(self.image_processor.preprocess(image)))]

    def render(self, messages: Sequence[ChatMessage], system: str) -> Prompt:
        """The prompt of a conversation, up to where the assistant's answer begins. system: "" for none.

        A full stop follows whatever the user says, as in the released code.
        """
        prompt: Prompt = [self.special_tokens.bos]
        if self.chat_config.template == "plain":
            if len(messages) > 1:
                raise ValueError(f"got {len(messages)} messages for the plain template: expected one, the user's")
            return [*prompt, *messages[0].content]
        prompt.append(f"{system} " if system else "")
        for message in messages:
            prompt += [f"{message.role.upper()}: ", *message.content, ". " if message.role == "user" else " "]
        return [*prompt, "ASSISTANT:"]

    def labelled_conversation(
        self, messages: Sequence[ChatMessage], *, learned: Collection[int], system: str | None = None
    ) -> list[Part]:
        """A whole conversation, in which some answers, and the id that ends each, carry labels.

        learned: the places of these messages, which are texts, the last message's among them. The id that ends an answer
        is not in the sequence but is what its last row must predict, as a conversation that goes on has it. system: in
        place of the default one; "" for none.
        """
        *before, last = with_placeholders(messages, learned)
        prompt = self.render(before, self.default_system if system is None else system)
        space = [] if self.chat_config.template == "plain" else [" "]
        return self.label_answers([*prompt, *space, *last.content], messages)

    def labelled_texts(self, pieces: Sequence[str | Image.Image]) -> list[Part]:
        """Texts and images in order, without roles; the ids of all texts carry labels, and the one that ends the last."""
        return self.label_texts([self.special_tokens.bos, *pieces])

    def generation_parts(self, prompt: str, grid: tuple[int, int], images: Sequence[ImageInput] = ()) -> list[Part]:
        """A prompt to generate an image of a grid (h, w) from; its own images stand in front of the text."""
        (message,) = self.parse_messages([{"role": "user", "content": prompt, "images": images}])
        return self.to_parts([self.special_tokens.bos, *message.content, *self.image_start(grid)])

    def negative_parts(self, prompt: str, grid: tuple[int, int]) -> list[Part]:
        """A negative prompt, "" for none, for an image of a grid (h, w): of the same form, without images."""
        return self.to_parts([self.special_tokens.bos, prompt, *self.image_start(grid)])
