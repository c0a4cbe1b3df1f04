"""What UniWorld asks of its reader: a prompt with its pictures, up to where an answer would begin.

Made without the model, so that training can make its batches ahead. docs/originals/uniworld.md, "Condition".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from PIL import Image
from typing_extensions import Self

from unimm.models.uniworld.config import ASPECT_RATIOS
from unimm.processing.requests import broadcast, check_size, expand_seeds
from unimm.sequence.parts import Part
from unimm.vlms.qwen2_5_vl.processor import IMAGE_PAD, QwenVLProcessor

SIDE_UNIT = 32  # pixels; of a side's unit
MAX_IMAGE_SIDE = 4096  # pixels a side of what is drawn
ReferenceLatents = Literal["tokens", "condition"]


@dataclass(frozen=True, kw_only=True)
class UniWorldProcessor:
    """Prompts and pictures to items. system: of every prompt, "" for none, as released; in_front: where pictures stand."""

    mllm_processor: QwenVLProcessor
    system_prompt: str
    images_first: bool

    def prompt_parts(self, prompt: str, images: Sequence[Image.Image] = ()) -> list[Part]:
        """A prompt and its pictures, which stand where it says the placeholder, or else all behind it or in front.

        A picture is resized twice, as in the original: the second time its size is another, since the first has rounded
        it. Raises ValueError for an empty prompt.
        """
        placed = IMAGE_PAD in prompt or self.images_first or not prompt.strip()
        content = prompt if placed else prompt + IMAGE_PAD * len(images)
        resized = [self.mllm_processor.image_processor(picture) for picture in images]
        return self.mllm_processor.conversation_parts(
            [{"role": "user", "content": content, "images": resized}], system=self.system_prompt
        )


@dataclass(frozen=True, kw_only=True)
class UniWorldImageOptions:
    """How pictures are painted; sizes, seeds and guidances are one a picture, (height, width) None for the pictures' own.

    t5, clip: whether they are told the prompt; None: where they are. references: see `UniWorld.generate`.
    """

    steps: int
    sizes: Sequence[tuple[int, int] | None] = ()
    seeds: Sequence[int] = ()
    guidance_scales: Sequence[float] = ()
    true_cfg_scales: Sequence[float] = ()
    t5: bool | None = None
    clip: bool | None = None
    reference_latents: ReferenceLatents | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or not all(scale >= 0 for scale in (*self.guidance_scales, *self.true_cfg_scales)):
            raise ValueError(
                f"got steps {self.steps}, guidances {[*self.guidance_scales]}, text guidances {[*self.true_cfg_scales]}: expected a "
                "step, and scales of 0 or more"
            )
        if self.reference_latents not in (None, *get_args(ReferenceLatents)):
            raise ValueError(f"got references {self.reference_latents!r}: expected None, 'tokens' or 'condition'")

    def for_prompts(
        self,
        n_prompts: int,
        n: int,
        *,
        stride: int,
        size: tuple[int, int] | None,
        seed: int | Sequence[int],
        guidance: float | Sequence[float],
        true_cfg_scale: float | Sequence[float],
    ) -> Self:
        """These options for `n` pictures of each prompt, in the order of the prompts; a guidance is one, or one a prompt.

        Raises ValueError for other lengths, and for a size that is no multiple of `stride`.
        """
        if n < 1:
            raise ValueError(f"got n {n}: expected a picture of each prompt, or more")
        image_size = None if size is None else check_size(size, stride, MAX_IMAGE_SIDE)
        scales = [broadcast(guidance, n_prompts, "guidances"), broadcast(true_cfg_scale, n_prompts, "text guidances")]
        guidances, text_guidances = ([float(one) for one in some for _ in range(n)] for some in scales)
        return replace(
            self,
            sizes=[image_size] * (n * n_prompts),
            seeds=expand_seeds(seed, n_prompts, n_images=n),
            guidance_scales=guidances,
            true_cfg_scales=text_guidances,
        )


def nearest_aspect_size(
    height: int, width: int, *, image_pixels: int, n_ratios: int = len(ASPECT_RATIOS), side_unit: int = SIDE_UNIT
) -> tuple[int, int]:
    """(height, width) to draw for a picture of the size given: the nearest of the first `ratios` ratios (1, 5, 7, 9 or 11).

    A side is a whole multiple of `stride` times the ratio's number, so the area may be far from `pixels`: 16:9 at
    1024 x 1024 is 864 x 1536. Raises ValueError for sides, pixels or ratios below 1.
    """
    if min(height, width, image_pixels, side_unit) < 1 or not 1 <= n_ratios <= len(ASPECT_RATIOS):
        raise ValueError(
            f"got a picture of {width}x{height}, {image_pixels} pixels, {n_ratios} ratios: expected positive sizes, 1 to {len(ASPECT_RATIOS)}"
        )
    across, down = min(ASPECT_RATIOS[:n_ratios], key=lambda ratio: abs(ratio[0] / ratio[1] - width / height))
    scale = max(1, round(math.sqrt(image_pixels / (across * down * side_unit**2))))
    return down * side_unit * scale, across * side_unit * scale
