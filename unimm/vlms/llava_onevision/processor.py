"""Conversations in LLaVA-OneVision's chat format as parts: special tokens, and images whole and in tiles.

docs/originals/metaquery.md, "Queries and prompt".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image

from unimm.processing.chat_templates import ChatMessage, Prompt
from unimm.processing.images.llava_onevision import LlavaOnevisionImageProcessor
from unimm.sequence.parts import ImagePart, Part, text_part
from unimm.sequence.segments import Segment
from unimm.vlms.llava_onevision.config import LlavaSpecialTokens
from unimm.vlms.processor import IM_END, IM_START, VLMProcessor

IMAGE_TOKEN = "<image>"  # the placeholder of an image


@dataclass(frozen=True, kw_only=True)
class LlavaOneVisionProcessor(VLMProcessor):
    """Conversations in LLaVA-OneVision's chat format as parts.

    always_tiled: whether every image is encoded in tiles, too; else a single image of a prompt is, and several are not.
    """

    image_processor: LlavaOnevisionImageProcessor
    special_tokens: LlavaSpecialTokens
    always_tiled: bool = False

    IMAGE_PLACEHOLDER: ClassVar[str] = IMAGE_TOKEN

    @property
    def default_system(self) -> str:
        """None, as in the released chat template."""
        return ""

    def render(self, messages: Sequence[ChatMessage], system: str) -> Prompt:
        """The prompt of a conversation, up to where the assistant's answer begins. system: "" for none."""
        im_start = self.special(IM_START)
        im_end = self.special(IM_END)
        prompt: Prompt = [im_start, f"system \n{system}", im_end] if system else []
        for message in messages:
            # images that all stand in front of the text are on the line of the role
            front = message.content[: message.n_images]
            n = len(front) if all(isinstance(piece, Image.Image) for piece in front) else 0
            prompt += [im_start, f"{message.role} ", *message.content[:n], "\n", *message.content[n:], im_end]
        return [*prompt, im_start, "assistant\n"]

    def image_prompt(self, image: Image.Image, n_images: int) -> list[str | int | Part]:
        """An RGB image as a part, with nothing around it."""
        return [self.und_image_part(image, tiled=self.always_tiled or n_images == 1)]

    def whole_image_part(self, image: Image.Image) -> ImagePart:
        """An RGB image as a part without tiles."""
        return self.und_image_part(image, tiled=False)

    def ids_to_parts(self, ids: Sequence[int], images: Sequence[Image.Image], *, tiled: bool) -> list[Part]:
        """Ids with a placeholder for each image, as parts. Raises ValueError where there are not as many."""
        placeholders = [i for i, one in enumerate(ids) if one == self.special_tokens.image]
        if len(placeholders) != len(images):
            raise ValueError(
                f"got {len(placeholders)} placeholders for {len(images)} images: write {IMAGE_TOKEN} for each"
            )
        parts: list[Part] = []
        for begin, end, image in zip([-1, *placeholders], [*placeholders, len(ids)], [None, *images], strict=True):
            parts += [] if image is None else [self.und_image_part(image, tiled=tiled)]
            parts += [text_part(ids[begin + 1 : end])] if end > begin + 1 else []
        return parts

    def und_image_part(self, image: Image.Image, *, tiled: bool) -> ImagePart:
        """An RGB image, with no ids around it. Each row holds (height, width, tiles), from which the model arranges
        them.
        """
        tiles = self.image_processor.preprocess(image, tiled=tiled)
        n = self.image_processor.n_image_tokens(image.height, image.width, tiled=tiled)
        none = torch.zeros(0, dtype=torch.long)
        return ImagePart(
            kind="und_image",
            segment=Segment(length=n, attention="causal", advance=n),
            ids=none,
            labels=none,
            tokens=torch.tensor([[image.height, image.width, len(tiles)]]).expand(n, 3),
            image_position_ids=torch.arange(n),
            pixel_values=tiles,
        )
