"""UniWorld's processor: a prompt and its images to parts, up to where an answer would begin; sizes; a call's options.

It needs no weights, so that training prepares batches in other processes. docs/originals/uniworld.md, "Condition".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image

from unimm.generation.flow import parse_steps
from unimm.generation.numbers import parse_flag
from unimm.generation.step_cache import StepCacheOptions, parse_step_cache
from unimm.models.uniworld.config import ASPECT_RATIOS
from unimm.sequence.parts import Part
from unimm.vlms.qwen2_5_vl.processor import IMAGE_PAD, QwenVLProcessor

ASSISTANT = "assistant"  # the task head reads the state of the last token of this word
SIDE_UNIT = 32  # pixels; a side is a multiple of this times the number of its aspect ratio
MAX_IMAGE_SIDE = 4096  # pixels a side of a generated image
ReferenceLatents = Literal["tokens", "condition"]


@dataclass(frozen=True, kw_only=True)
class UniWorldProcessor:
    """Prompts and images to parts. system_prompt: "" for none, as released. images_first: before the text, else behind
    it."""

    mllm_processor: QwenVLProcessor
    system_prompt: str
    images_first: bool

    @property
    def assistant_id(self) -> int:
        """The id of "assistant". Raises ValueError for a tokenizer that splits the word."""
        ids = self.mllm_processor.text_tokenizer.encode(ASSISTANT)
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer makes {len(ids)} ids of {ASSISTANT!r}: expected one, whose state the head reads"
            )
        return ids[0]

    def prompt_parts(self, prompt: str, images: Sequence[Image.Image] = ()) -> list[Part]:
        """The parts of a prompt and its images, which stand at its <|image_pad|> placeholders, or else all before or
        after it.

        An image is resized twice, as in the original: the first resize rounds its size, so that the second differs.
        Raises ValueError for an empty prompt.
        """
        placed = IMAGE_PAD in prompt or self.images_first or not prompt.strip()
        content = prompt if placed else prompt + IMAGE_PAD * len(images)
        resized = [self.mllm_processor.image_processor(image) for image in images]
        return self.mllm_processor.conversation_parts(
            [{"role": "user", "content": content, "images": resized}], system=self.system_prompt
        )


@dataclass(frozen=True, kw_only=True)
class UniWorldImageOptions:
    """Options of one call that generates images. Sizes, seeds and scales are one an image; a size is (height, width),
    None for the input images' own.

    t5, clip: whether the text encoders encode the prompt; None: where they are loaded. reference_latents: see
    `UniWorld.generate`.
    """

    steps: int
    sizes: Sequence[tuple[int, int] | None]
    seeds: Sequence[int]
    guidance_scales: Sequence[float]
    true_cfg_scales: Sequence[float]
    t5: bool | None = None
    clip: bool | None = None
    reference_latents: ReferenceLatents | None = None
    step_cache: StepCacheOptions | bool | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", parse_steps(self.steps))
        object.__setattr__(self, "step_cache", parse_step_cache(self.step_cache))
        object.__setattr__(self, "progress", parse_flag(self.progress, "progress"))
        for name in ("t5", "clip"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, parse_flag(given, name))
        given = self.reference_latents
        if given is not None and (not isinstance(given, str) or given not in get_args(ReferenceLatents)):
            raise ValueError(
                f"got reference_latents {self.reference_latents!r}: expected None, 'tokens' or 'condition'"
            )


def nearest_aspect_size(
    height: int, width: int, *, image_pixels: int, n_ratios: int = len(ASPECT_RATIOS), side_unit: int = SIDE_UNIT
) -> tuple[int, int]:
    """The (height, width) of an image of about image_pixels, in the aspect ratio nearest to that of height and width.

    n_ratios: how many of ASPECT_RATIOS to choose from. A side is a multiple of side_unit times the ratio's number, so
    the area may be far from image_pixels: 16:9 at 1024 x 1024 is 864 x 1536. Raises ValueError for numbers below 1.
    """
    if min(height, width, image_pixels, side_unit) < 1 or not 1 <= n_ratios <= len(ASPECT_RATIOS):
        raise ValueError(
            f"got an image of {width}x{height}, {image_pixels} pixels, {n_ratios} ratios: expected positive sizes, "
            f"and 1 to {len(ASPECT_RATIOS)} ratios"
        )
    wide, high = min(ASPECT_RATIOS[:n_ratios], key=lambda ratio: abs(ratio[0] / ratio[1] - width / height))
    scale = max(1, round(math.sqrt(image_pixels / (wide * high * side_unit**2))))
    return high * side_unit * scale, wide * side_unit * scale
