"""What a conversation with pictures is in Qwen2.5-VL's sequence: texts in its chat template, pictures behind a marker.

Made without the model, so that training can make its batches ahead. docs/originals/blocks.md, "Position ids (M-RoPE)"
and "Image processor".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from unimm.processing.chat_templates import ChatMessage, Prompt
from unimm.processing.images.io import load_image
from unimm.processing.images.qwen2_vl import PatchGrid, Qwen2VLImageProcessor
from unimm.processing.requests import ImageInput
from unimm.sequence.parts import IGNORE_INDEX, ImagePart, Part, text_part
from unimm.sequence.segments import Segment
from unimm.vlms.processor import IM_END, IM_START, VLMProcessor
from unimm.vlms.qwen2_5_vl.config import QwenSpecialTokens, QwenVisionConfig
from unimm.vlms.qwen2_5_vl.vision import cell_positions

IMAGE_PAD = "<|image_pad|>"  # the placeholder of an image
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."  # of the released chat template


@dataclass(frozen=True, kw_only=True)
class QwenVLProcessor(VLMProcessor):
    """Conversations in Qwen2.5-VL's chat format as parts."""

    image_processor: Qwen2VLImageProcessor
    vision_config: QwenVisionConfig
    special_tokens: QwenSpecialTokens

    IMAGE_PLACEHOLDER: ClassVar[str] = IMAGE_PAD

    @property
    def default_system(self) -> str:
        """The system prompt of the released chat template."""
        return DEFAULT_SYSTEM_PROMPT

    def render(self, messages: Sequence[ChatMessage], system: str) -> Prompt:
        """The prompt of a conversation, up to where the assistant's answer begins. system: "" for none."""
        im_start = self.special(IM_START)
        im_end = self.special(IM_END)
        prompt: Prompt = [im_start, f"system\n{system}", im_end, "\n"] if system else []
        for message in messages:
            prompt += [im_start, f"{message.role}\n", *message.content, im_end, "\n"]
        return [*prompt, im_start, "assistant\n"]

    def image_prompt(self, image: Image.Image, n_images: int) -> list[str | int | Part]:
        """An RGB image as a part behind <|vision_start|>, and <|vision_end|>."""
        return [self.und_image_part(*self.image_processor.to_patches([image])), self.special(VISION_END)]

    def ids_to_parts(
        self, ids: Sequence[int], images: Sequence[tuple[Tensor, PatchGrid]], *, seconds_per_frame: Sequence[float] = ()
    ) -> list[Part]:
        """Ids with runs of placeholders, each a picture's or a video's, as items. shown: patches and grid of each run.

        A run may be a single id or as long as the picture has cells. seconds: of each of `shown`, what a step of its grid
        in time lasts; a still picture's is 0, and so are all unless given. Raises ValueError where runs and pictures differ.
        """
        left = iter(zip(images, seconds_per_frame or [0.0] * len(images), strict=True))
        out: list[Part] = []
        text: list[int] = []
        for one, length in _runs(ids, (self.special_tokens.image_pad, self.special_tokens.video_pad)):
            if not length:
                text.append(one)
                continue
            if not text or text.pop() != self.special_tokens.vision_start:
                raise ValueError(
                    "got a picture's placeholder without the marker <|vision_start|> before it: add the marker"
                )
            found = next(left, None)
            item = None if found is None else self.und_image_part(*found[0], seconds_per_frame=found[1])
            if item is None or length not in (1, item.n_tokens):
                n = "no picture" if item is None else f"a picture of {item.n_tokens} cells"
                raise ValueError(f"got {length} placeholders for {n}: expected one for each picture, or one a cell")
            out += [text_part(text), item] if text else [item]
            text = []
        if next(left, None) is not None:
            raise ValueError(f"got {len(images)} pictures and fewer placeholders: write {IMAGE_PAD} where each belongs")
        return [*out, text_part(text)] if text else out

    def und_image_part(self, patches: Tensor, grid: PatchGrid, *, seconds_per_frame: float = 0.0) -> ImagePart:
        """A picture's patches [N, C*T*p*p] behind the marker <|vision_start|>; its tokens are cells.

        Places [n, 3] are (time, row, column) from where the picture begins; the text behind it starts past the largest.
        """
        places = cell_positions(grid, self.vision_config.spatial_merge_size)
        places[:, 0] = (
            places[:, 0] * seconds_per_frame * self.vision_config.tokens_per_second
        ).long()  # truncated, as in the original
        n = len(places)
        return ImagePart(
            kind="und_image",
            segment=Segment(length=n + 1, attention="causal", advance=int(places.max()) + 2),
            ids=torch.tensor([self.special_tokens.vision_start]),
            labels=torch.tensor([IGNORE_INDEX]),
            tokens=rearrange(patches, "(n s) f -> n (s f)", n=n),
            image_position_ids=places,
        )


def _runs(ids: Sequence[int], pad_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each id that is no pad, with 0; each run of equal pads once, with its length."""
    run = 0
    for i, one in enumerate(ids):
        run = run + 1 if one in pad_ids else 0
        if not run:
            yield one, 0
        elif i + 1 == len(ids) or ids[i + 1] != one:
            yield one, run
            run = 0


def video_frames(images: Sequence[ImageInput]) -> list[Image.Image]:
    """Pictures of one size as the frames of a video. Raises ValueError where the sizes differ."""
    opened = [load_image(picture) for picture in images]
    if len({picture.size for picture in opened}) != 1:
        raise ValueError(
            f"got frames of sizes {[picture.size for picture in opened]}: expected some, of one size; resize them"
        )
    return opened
