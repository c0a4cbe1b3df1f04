"""UniWorld's edit-region weights: where an edit changed an image, and how much more its loss counts there.

Lin et al. 2025, arXiv 2506.03147, section 3; docs/originals/uniworld.md, "Edit-region weights", has what the code does.
Masks are [h, w] bool, images [h, w, 3] uint8.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

Array = NDArray[Any]

# the weight of a region by x, the image's area over its own: the smaller, the more. The release has the second; all are
# 1 at x = 1
AREA_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "log": lambda x: float(np.log2(x)) + 1,
    "exp": lambda x: 2 ** (x**0.5 - 1),
    "quadratic": lambda x: (x**0.5 - 1) ** 2 + 1,
}
# that a weight is rounded to
WEIGHT_DECIMALS = 6


class SmallEditError(ValueError):
    """An edit of so few pixels that it is likely no edit: a data set takes another sample."""


@dataclass(frozen=True, kw_only=True)
class EditWeights:
    """The numbers of the mask, those of the release, and the function of its area."""

    # least difference in brightness, of 255
    threshold: int = 18
    # side of the ellipse that closes gaps, in pixels
    closing: int = 5
    # least area of a region, as a part of all changed pixels
    min_component: float = 0.3
    # least area of an edit, as a part of the image
    min_area: float = 0.001
    # pixels a latent, along each side
    factor: int = 8
    # a name of AREA_FUNCTIONS
    function: str = "log"

    def __post_init__(self) -> None:
        if self.function not in AREA_FUNCTIONS:
            raise ValueError(f"unknown function {self.function!r}: expected one of {', '.join(AREA_FUNCTIONS)}")
        if self.closing < 1 or self.closing % 2 == 0 or self.factor < 1:
            raise ValueError(
                f"got closing {self.closing}, factor {self.factor}: expected an odd side and a positive factor"
            )

    def __call__(self, references: Sequence[Array], target: Array) -> Tensor:
        """Images of one size -> the weights of the loss, [1, h / 8, w / 8] float32: 1 outside of the edit.

        All ones where there is no reference, or no difference from the only one. Raises SmallEditError for an edit
        under `min_area`, ValueError where several references leave no pixel in common, and for other shapes.
        """
        mask = self.latent_mask(references, target)
        area = mask.sum() / mask.size
        weight = round(AREA_FUNCTIONS[self.function](1 / area), WEIGHT_DECIMALS) if area else 1.0
        return torch.from_numpy(np.where(mask, weight, 1.0).astype(np.float32))[None]

    def latent_mask(self, references: Sequence[Array], target: Array) -> Array:
        """The mask at the size of the latents, [h / 8, w / 8]: stages 1 to 3 of each reference, intersected, then 4."""
        mask = np.ones(target.shape[:2], bool)
        for reference in references:
            mask &= self.drop_small_components(self.close_gaps(self.difference_mask(reference, target)))
        if not mask.any():
            if len(references) > 1:
                raise ValueError(
                    f"got {len(references)} references whose edits share no pixel: weigh this sample evenly"
                )
            mask[:] = True
        if (area := mask.mean()) < self.min_area:
            raise SmallEditError(
                f"got an edit of {area:.4%} of an image, expected {self.min_area:.2%}: take another sample"
            )
        return self.close_gaps(self.pool(mask))

    def difference_mask(self, reference: Array, target: Array) -> Array:
        """Stage 1: where the brightness of the difference, channel by channel, reaches the threshold."""
        is_uint8 = reference.dtype == target.dtype == np.uint8
        if reference.shape != target.shape or target.ndim != 3 or target.shape[2] != 3 or not is_uint8:
            raise ValueError(
                f"got images {reference.shape} and {target.shape}: expected one size, [h, w, 3] in uint8; resize first"
            )
        difference = np.abs(reference.astype(np.int64) - target.astype(np.int64))
        # PIL's brightness, in its integers
        brightness = (difference @ np.array([19595, 38470, 7471]) + 32768) >> 16
        return brightness >= self.threshold

    def close_gaps(self, mask: Array) -> Array:
        """Stage 2: fill gaps narrower than the ellipse; what lies outside of the image does not count."""
        shape = ellipse(self.closing)
        return ndimage.binary_erosion(ndimage.binary_dilation(mask, shape), shape, border_value=1)

    def drop_small_components(self, mask: Array) -> Array:
        """Stage 3: keep regions of at least a part of all changed pixels; corners connect."""
        labels, n = ndimage.label(mask, np.ones((3, 3)))
        areas = np.bincount(labels.ravel(), minlength=n + 1)
        kept = areas >= self.min_component * mask.sum()
        kept[0] = False
        return kept[labels]

    def pool(self, mask: Array) -> Array:
        """Stage 4: latents with a changed pixel; pixels at the edges that fill no latent are left out."""
        h, w = (side // self.factor for side in mask.shape)
        whole = mask[: h * self.factor, : w * self.factor]
        return np.asarray(whole.reshape(h, self.factor, w, self.factor).any((1, 3)))


def ellipse(side: int) -> Array:
    """An ellipse in a square of odd side, as OpenCV has it: the middle column alone in the first and last rows."""
    r = side // 2
    if not r:
        return np.ones((1, 1), bool)
    rows, columns = np.mgrid[-r : r + 1, -r : r + 1]
    return np.abs(columns) <= np.rint(r * np.sqrt((r * r - rows * rows) / (r * r)))
