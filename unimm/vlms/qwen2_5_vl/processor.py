"""Conversations in Qwen2.5-VL's chat format as parts: special tokens, image patches and their positions.

docs/originals/blocks.md, "Position ids (M-RoPE)" and "Image processor".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from unimm.processing.chat_templates import ChatMessage, Prompt
from unimm.processing.images.io import load_images
from unimm.processing.images.qwen2_vl import PatchGrid, Qwen2VLImageProcessor
from unimm.processing.requests import ImageInput
from unimm.sequence.parts import IGNORE_INDEX, ImagePart, Part, text_part
from unimm.sequence.segments import Segment
from unimm.vlms.processor import IM_END, IM_START, VLMProcessor
from unimm.vlms.qwen2_5_vl.config import QwenSpecialTokens, QwenVisionConfig
from unimm.vlms.qwen2_5_vl.vision import cell_positions

IMAGE_PAD = "<|image_pad|>"  # the placeholder of an image
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
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
        return [self.whole_image_part(image), self.special(VISION_END)]

    def whole_image_part(self, image: Image.Image) -> ImagePart:
        """An RGB image as a part behind <|vision_start|>."""
        return self.und_image_part(*self.image_processor.to_patches([image]))

    def ids_to_parts(
        self, ids: Sequence[int], images: Sequence[tuple[Tensor, PatchGrid]], *, seconds_per_frame: Sequence[float] = ()
    ) -> list[Part]:
        """Ids with runs of placeholders, each an image's or a video's, as parts. images: patches and grid of each run.

        A run may be a single id or as long as the image has cells. seconds_per_frame: of each of `images`, how long a
        step of its grid in time is; 0 for an image, and for all unless given. Raises ValueError where runs and images
        differ.
        """
        remaining = iter(zip(images, seconds_per_frame or [0.0] * len(images), strict=True))
        parts: list[Part] = []
        text: list[int] = []
        for one, length in _runs(ids, (self.special_tokens.image_pad, self.special_tokens.video_pad)):
            if not length:
                text.append(one)
                continue
            if not text or text.pop() != self.special_tokens.vision_start:
                raise ValueError(f"got an image placeholder without {VISION_START} before it: add the special token")
            image = next(remaining, None)
            part = None if image is None else self.und_image_part(*image[0], seconds_per_frame=image[1])
            if part is None or length not in (1, part.n_tokens):
                got = "no image" if part is None else f"an image of {part.n_tokens} cells"
                raise ValueError(f"got {length} placeholders for {got}: expected one for each image, or one a cell")
            parts += [text_part(text), part] if text else [part]
            text = []
        if next(remaining, None) is not None:
            raise ValueError(f"got {len(images)} images and fewer placeholders: write {IMAGE_PAD} where each belongs")
        return [*parts, text_part(text)] if text else parts

    def und_image_part(self, patches: Tensor, grid: PatchGrid, *, seconds_per_frame: float = 0.0) -> ImagePart:
        """The patches [N, C*T*p*p] of an image behind <|vision_start|>; its tokens are cells.

        Their positions [n, 3] are (time, row, column) from where the image begins; the text behind it follows the
        largest.
        """
        positions = cell_positions(grid, self.vision_config.spatial_merge_size)
        times = positions[:, 0] * seconds_per_frame * self.vision_config.tokens_per_second
        positions[:, 0] = times.long()  # truncated, as in the original
        n = len(positions)
        return ImagePart(
            kind="und_image",
            segment=Segment(length=n + 1, attention="causal", advance=int(positions.max()) + 2),
            ids=torch.tensor([self.special_tokens.vision_start]),
            labels=torch.tensor([IGNORE_INDEX]),
            tokens=rearrange(patches, "(n s) f -> n (s f)", n=n),
            image_position_ids=positions,
        )


def _runs(ids: Sequence[int], pad_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(id, 0) of each id that is no pad, and (id, length) of each run of equal pads."""
    run = 0
    for i, one in enumerate(ids):
        run = run + 1 if one in pad_ids else 0
        if not run:
            yield one, 0
        elif i + 1 == len(ids) or ids[i + 1] != one:
            yield one, run
            run = 0


def video_frames(images: Sequence[ImageInput]) -> list[Image.Image]:
    """Images of one size as the frames of a video. Raises ValueError where the sizes differ."""
    frames = load_images(images, of="the video")
    sizes = [frame.size for frame in frames]
    if len(set(sizes)) != 1:
        raise ValueError(f"got frames of sizes {sizes}: expected some, of one size; resize them")
    return frames
