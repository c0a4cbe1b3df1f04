"""What a conversation with pictures is in LLaVA-OneVision's sequence: texts in its chat template, pictures as rows.

Made without the model, so that training can make its batches ahead. docs/originals/metaquery.md, "Queries and prompt".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image

from unimm.processing.images.io import load_image
from unimm.processing.images.llava_onevision import LlavaOnevisionImageProcessor
from unimm.processing.requests import ImageInput, Message
from unimm.sequence.parts import Part, text_part
from unimm.sequence.segments import Segment
from unimm.tokenizers.text import encode_marked, hide_markers
from unimm.vlms.llava_onevision.config import LlavaSpecialTokens
from unimm.vlms.processor import IM_END, IM_START, VLMProcessor, check_last_role

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True, kw_only=True)
class LlavaOneVisionProcessor(VLMProcessor):
    """Conversations to items."""

    image_processor: LlavaOnevisionImageProcessor
    special_tokens: LlavaSpecialTokens

    IMAGE_PLACEHOLDER: ClassVar[str] = IMAGE_TOKEN

    def render(self, messages: Sequence[Message], *, system: str | None = None) -> tuple[str, list[ImageInput]]:
        """The text of a conversation, for `composed`, and its pictures; a caller may add to the text. No system prompt
        unless one is given."""
        text = f"{IM_START}system \n{hide_markers(self.text_tokenizer, system)}{IM_END}" if system else ""
        shown: list[ImageInput] = []
        for turn in messages:
            content, images = self.message_content(turn)
            ahead = IMAGE_TOKEN * len(images) if content.startswith(IMAGE_TOKEN * len(images)) else ""
            text += f"{IM_START}{turn['role']} {ahead}\n{content[len(ahead) :]}{IM_END}"
            shown += images
        check_last_role(messages)
        return text + f"{IM_START}assistant\n", shown

    def composed(self, text: str, images: Sequence[ImageInput], *, tiled: bool | None = None) -> list[Part]:
        """A text in which markers are markers, with a `PLACEHOLDER` for each picture, as items.

        tiled: whether pictures are seen in tiles, too; unless given, a single one is, and several are not.
        """
        cut = len(images) == 1 if tiled is None else tiled
        return self.ids_to_parts(
            encode_marked(self.text_tokenizer, text), [load_image(picture) for picture in images], tiled=cut
        )

    def ids_to_parts(self, ids: Sequence[int], images: Sequence[Image.Image], *, tiled: bool) -> list[Part]:
        """Ids with a placeholder for each picture, as items. Raises ValueError where they are not as many."""
        places = [i for i, one in enumerate(ids) if one == self.special_tokens.image]
        if len(places) != len(images):
            raise ValueError(f"got {len(places)} placeholders for {len(images)} pictures: write {IMAGE_TOKEN} for each")
        out: list[Part] = []
        for begin, end, picture in zip([-1, *places], [*places, len(ids)], [None, *images], strict=True):
            out += [] if picture is None else [self.und_image_part(picture, tiled=tiled)]
            out += [text_part(ids[begin + 1 : end])] if end > begin + 1 else []
        return out

    def und_image_part(self, image: Image.Image, *, tiled: bool) -> Part:
        """An RGB picture: no marker; of each row its picture's (height, width) and tiles, for the model to arrange them."""
        tiles = self.image_processor.preprocess(image, tiled=tiled)
        n = self.image_processor.n_image_tokens(image.height, image.width, tiled=tiled)
        none = torch.zeros(0, dtype=torch.long)
        return Part(
            kind="und_image",
            segment=Segment(length=n, attention="causal", advance=n),
            ids=none,
            labels=none,
            tokens=torch.tensor([[image.height, image.width, len(tiles)]]).expand(n, 3),
            image_position_ids=torch.arange(n),
            pixel_values=tiles,
        )
