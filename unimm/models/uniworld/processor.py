"""What UniWorld asks of its reader: a prompt with its pictures, up to where an answer would begin.

Made without the model, so that training can make its batches ahead. docs/originals/uniworld.md, "Condition".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from PIL import Image
from typing_extensions import Self

from unimm.models.uniworld.config import RATIOS
from unimm.processing.requests import drawable, each, seeds
from unimm.sequence.parts import Item
from unimm.vlms.qwen2_5_vl.processor import PLACEHOLDER, QwenPrompts

STRIDE = 32  # pixels; of a side's unit
LARGEST = 4096  # pixels a side of what is drawn
References = Literal["tokens", "condition"]


@dataclass(frozen=True, kw_only=True)
class UniWorldPrompts:
    """Prompts and pictures to items. system: of every prompt, "" for none, as released; in_front: where pictures stand."""

    reader: QwenPrompts
    system: str
    in_front: bool

    def drawing(self, prompt: str, pictures: Sequence[Image.Image] = ()) -> list[Item]:
        """A prompt and its pictures, which stand where it says the placeholder, or else all behind it or in front.

        A picture is resized twice, as in the original: the second time its size is another, since the first has rounded
        it. Raises ValueError for an empty prompt.
        """
        placed = PLACEHOLDER in prompt or self.in_front or not prompt.strip()
        content = prompt if placed else prompt + PLACEHOLDER * len(pictures)
        once = [self.reader.pixels(picture) for picture in pictures]
        return self.reader.conversation([{"role": "user", "content": content, "images": once}], system=self.system)


@dataclass(frozen=True, kw_only=True)
class Painting:
    """How pictures are painted; sizes, seeds and guidances are one a picture, (height, width) None for the pictures' own.

    t5, clip: whether they are told the prompt; None: where they are. references: see `UniWorld.generate`.
    """

    steps: int
    sizes: Sequence[tuple[int, int] | None] = ()
    seeds: Sequence[int] = ()
    guidances: Sequence[float] = ()
    text_guidances: Sequence[float] = ()
    t5: bool | None = None
    clip: bool | None = None
    references: References | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or not all(scale >= 0 for scale in (*self.guidances, *self.text_guidances)):
            raise ValueError(
                f"got steps {self.steps}, guidances {[*self.guidances]}, text guidances {[*self.text_guidances]}: expected a "
                "step, and scales of 0 or more"
            )
        if self.references not in (None, *get_args(References)):
            raise ValueError(f"got references {self.references!r}: expected None, 'tokens' or 'condition'")

    def of(
        self,
        prompts: int,
        n: int,
        *,
        stride: int,
        size: tuple[int, int] | None,
        seed: int | Sequence[int],
        guidance: float | Sequence[float],
        text_guidance: float | Sequence[float],
    ) -> Self:
        """These options for `n` pictures of each prompt, in the order of the prompts; a guidance is one, or one a prompt.

        Raises ValueError for other lengths, and for a size that is no multiple of `stride`.
        """
        if n < 1:
            raise ValueError(f"got n {n}: expected a picture of each prompt, or more")
        fits = None if size is None else drawable(size, stride, LARGEST)
        scales = [each(guidance, prompts, "guidances"), each(text_guidance, prompts, "text guidances")]
        guidances, text_guidances = ([float(one) for one in some for _ in range(n)] for some in scales)
        return replace(
            self,
            sizes=[fits] * (n * prompts),
            seeds=seeds(seed, prompts, copies=n),
            guidances=guidances,
            text_guidances=text_guidances,
        )


def any_ratio(
    height: int, width: int, *, pixels: int, ratios: int = len(RATIOS), stride: int = STRIDE
) -> tuple[int, int]:
    """(height, width) to draw for a picture of the size given: the nearest of the first `ratios` ratios (1, 5, 7, 9 or 11).

    A side is a whole multiple of `stride` times the ratio's number, so the area may be far from `pixels`: 16:9 at
    1024 x 1024 is 864 x 1536. Raises ValueError for sides, pixels or ratios below 1.
    """
    if min(height, width, pixels, stride) < 1 or not 1 <= ratios <= len(RATIOS):
        raise ValueError(
            f"got a picture of {width}x{height}, {pixels} pixels, {ratios} ratios: expected positive sizes, 1 to {len(RATIOS)}"
        )
    across, down = min(RATIOS[:ratios], key=lambda ratio: abs(ratio[0] / ratio[1] - width / height))
    scale = max(1, round(math.sqrt(pixels / (across * down * stride**2))))
    return down * stride * scale, across * stride * scale
