"""Where an edit changed a picture, and how much more its loss counts there: UniWorld's edit-region weights.

Lin et al. 2025, arXiv 2506.03147, section 3; docs/originals/uniworld.md, "Edit-region weights", has what the code does.
Masks are [H, W] bool, pictures [H, W, 3] uint8.
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

# a pixel counts for as much more as its region is smaller: x is the picture's area over the region's. The release has the
# second; all are 1 at x = 1
AREA_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "log": lambda x: float(np.log2(x)) + 1,
    "exp": lambda x: 2 ** (x**0.5 - 1),
    "quadratic": lambda x: (x**0.5 - 1) ** 2 + 1,
}
WEIGHT_DECIMALS = 6  # that a weight is rounded to


class SmallEditError(ValueError):
    """An edit of so few pixels that it is likely no edit: a data set draws another sample."""


@dataclass(frozen=True, kw_only=True)
class EditWeights:
    """The numbers of the mask, those of the release, and the function of its area."""

    threshold: int = 18  # least difference in brightness, of 255
    closing: int = 5  # side of the ellipse that closes gaps
    min_component: float = 0.3  # of all white pixels
    min_area: float = 0.001  # of the picture
    factor: int = 8  # pixels a cell
    function: str = "log"

    def __post_init__(self) -> None:
        if self.function not in AREA_FUNCTIONS:
            raise ValueError(f"unknown function {self.function!r}: expected one of {', '.join(AREA_FUNCTIONS)}")
        if self.closing < 1 or self.closing % 2 == 0 or self.factor < 1:
            raise ValueError(
                f"got closing {self.closing}, factor {self.factor}: expected an odd side and a positive factor"
            )

    def __call__(self, references: Sequence[Array], target: Array) -> Tensor:
        """Pictures of one size -> the weights of the loss, [1, H/8, W/8] float32: 1 outside of what was edited.

        All ones where there is no reference, or no difference from the only one. Raises SmallEditError for an edit under
        `least_area`, ValueError where several references leave no pixel in common, and for other shapes.
        """
        cells = self.latent_mask(references, target)
        share = cells.sum() / cells.size
        weight = round(AREA_FUNCTIONS[self.function](1 / share), WEIGHT_DECIMALS) if share else 1.0
        return torch.from_numpy(np.where(cells, weight, 1.0).astype(np.float32))[None]

    def latent_mask(self, references: Sequence[Array], target: Array) -> Array:
        """The mask at the size of the latents, [H/8, W/8]: stages 1 to 3 of every reference, their intersection, 4."""
        white = np.ones(target.shape[:2], bool)
        for reference in references:
            white &= self.drop_small_components(self.close_gaps(self.difference_mask(reference, target)))
        if not white.any():
            if len(references) > 1:
                raise ValueError(
                    f"got {len(references)} references whose edits share no pixel: weigh this sample evenly"
                )
            white[:] = True
        if (area := white.mean()) < self.min_area:
            raise SmallEditError(
                f"got an edit of {area:.4%} of a picture, expected {self.min_area:.2%}: draw another sample"
            )
        return self.close_gaps(self.pool(white))

    def difference_mask(self, reference: Array, target: Array) -> Array:
        """Stage 1: where the brightness of the difference, channel by channel, reaches the threshold."""
        shapes, bytes_ = (reference.shape, target.shape), reference.dtype == target.dtype == np.uint8
        if shapes[0] != shapes[1] or target.ndim != 3 or target.shape[2] != 3 or not bytes_:
            raise ValueError(
                f"got pictures {shapes[0]} and {shapes[1]}: expected one size, [H, W, 3] in uint8; resize first"
            )
        apart = np.abs(reference.astype(np.int64) - target.astype(np.int64))
        # PIL's brightness, in its integers
        brightness = (apart @ np.array([19595, 38470, 7471]) + 32768) >> 16
        return brightness >= self.threshold

    def close_gaps(self, white: Array) -> Array:
        """Stage 2: gaps narrower than the ellipse are filled; what lies outside of the picture says nothing."""
        shape = ellipse(self.closing)
        grown = ndimage.binary_dilation(white, shape)
        return ndimage.binary_erosion(grown, shape, border_value=1)

    def drop_small_components(self, white: Array) -> Array:
        """Stage 3: regions of at least a share of all that is white; neighbours may touch at a corner."""
        labels, n = ndimage.label(white, np.ones((3, 3)))
        areas = np.bincount(labels.ravel(), minlength=n + 1)
        kept = areas >= self.min_component * white.sum()
        kept[0] = False
        return kept[labels]

    def pool(self, white: Array) -> Array:
        """Stage 4: cells that hold a white pixel; pixels that fill no cell are left out."""
        h, w = (side // self.factor for side in white.shape)
        whole = white[: h * self.factor, : w * self.factor]
        return np.asarray(whole.reshape(h, self.factor, w, self.factor).any((1, 3)))


def ellipse(side: int) -> Array:
    """An ellipse in a square of odd side, as OpenCV draws it: the middle column alone in the first row and in the last."""
    r = side // 2
    if not r:
        return np.ones((1, 1), bool)
    rows, columns = np.mgrid[-r : r + 1, -r : r + 1]
    return np.abs(columns) <= np.rint(r * np.sqrt((r * r - rows * rows) / (r * r)))
