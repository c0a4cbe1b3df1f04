"""Reads the objects of a picture back from its pixels.

Every pixel is taken as a mixture of the background and one palette colour. Pixels more than half covered form the
objects, which the renderer keeps apart; the shape and size are those of the mask that lies nearest to the object's
coverage, anti-aliased edge and all. What is there but fits no colour or no shape is seen as UNCLEAR, not left out.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unimm.data.shapes.world import BACKGROUND, COLOURS, FULL, PALETTE, SHAPES, SIDE, Picture, coverage

UNCLEAR = "unclear"
# a patch of fewer pixels is a speck; the smallest object, a small star, has 43 that are more than half covered
SPECK = 16
# an object's mean colour may lie this far, in RGB, from a palette colour seen through a veil of at most 1 - VEIL
NEAR = 50.0
VEIL = 0.6
# of the pixels inside an object so many must have its colour
AGREED = 0.6
# least correlation of an object's coverage with the mask; blur and noise leave it high, a wrong outline does not
ALIKE = 0.88
# masks are tried at widths between the two sizes as well, so that a size between them does not pass for another shape
TRIED = {11: "small", 13: "small", 15: "large", 17: "large"}
# the mask is tried this far around the middle of the object's bounding box
REACH = 2
WINDOW = max(TRIED) + 2 * REACH
# and at each width also blurred, by a standard deviation of 1.4 pixels
BLUR = tuple(weight / 256 for weight in (1, 8, 28, 56, 70, 56, 28, 8, 1))

T = TypeVar("T", bound=np.generic)
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One object read from a picture; x and y are the centre of its box in pixels."""

    shape: str
    colour: str
    size: str
    x: int
    y: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bank:
    """Masks at every shift: flat [T, WINDOW * WINDOW], their squares' sums [T], and what each is."""

    masks: Floats
    squares: Floats
    meaning: tuple[tuple[str, str, int, int], ...]


@cache
def _bank() -> _Bank:
    """All shapes and sizes at all shifts."""
    masks, meaning = [], []
    shifts = range(-REACH, REACH + 1)
    for shape, (width, size), soft in product(SHAPES, TRIED.items(), (False, True)):
        mask = np.pad(coverage(shape, width) / FULL, (WINDOW - width) // 2)
        if soft:
            mask = ndimage.convolve1d(ndimage.convolve1d(mask, BLUR, axis=0, mode="constant"), BLUR, axis=1, mode="constant")
        for dy, dx in product(shifts, shifts):
            masks.append(np.roll(mask, (dy, dx), axis=(0, 1)).ravel())
            meaning.append((shape, size, dx, dy))
    stack = np.stack(masks).astype(np.float32)
    return _Bank(masks=stack, squares=(stack**2).sum(axis=1), meaning=tuple(meaning))


@cache
def _axes() -> tuple[Floats, Floats]:
    """From the background to each colour: unit vectors [8, 3] and lengths [8]."""
    steps = np.array([PALETTE[colour] for colour in COLOURS], np.float32) - np.array(BACKGROUND, np.float32)
    lengths = np.linalg.norm(steps, axis=1)
    return steps / lengths[:, None], lengths


def _mixture(offset: Floats, least: float) -> tuple[Floats, Floats]:
    """For colours less the background [..., 3]: the share of each palette colour and what it leaves over [..., 8]."""
    axes, lengths = _axes()
    along = offset @ axes.T
    share = np.clip(along / lengths, least, 1)
    reached = share * lengths
    left = (offset**2).sum(axis=-1, keepdims=True) - 2 * reached * along + reached**2
    return share, np.sqrt(np.maximum(left, 0))


def read(image: Picture) -> tuple[Seen, ...]:
    """The objects of a picture, uint8 [64, 64, 3], in rows from the top."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != (SIDE, SIDE, 3):
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"got a picture of {got}, expected uint8 [{SIDE}, {SIDE}, 3]; resize and round it first")
    offset = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
    share, left = _mixture(offset, 0.0)
    kind = left.argmin(axis=-1)
    cover = np.take_along_axis(share, kind[..., None], axis=-1)[..., 0]
    labels, n = ndimage.label(cover > 0.5)
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    kept = [label for label in range(1, n + 1) if sizes[label] >= SPECK]
    boxes = ndimage.find_objects(labels)
    seen = [_identify(offset, share, kind, np.isin(labels, kept), labels == label, boxes[label - 1]) for label in kept]
    return tuple(sorted(seen, key=lambda one: (one.y, one.x)))


def _identify(
    offset: Floats,
    share: Floats,
    kind: NDArray[np.intp],
    objects: NDArray[np.bool_],
    mine: NDArray[np.bool_],
    box: tuple[slice, slice],
) -> Seen:
    """The object on the pixels of mine, [64, 64], which lie in the box."""
    index, sure = _colour(offset, kind, mine)
    # what belongs to another object, and the blur one pixel around it, is none of this one's coverage
    foreign = ndimage.binary_dilation(objects & ~mine, structure=np.ones((3, 3), bool))
    cover = np.where(foreign & ~mine, 0, share[..., index])
    middle_y, middle_x = ((side.start + side.stop - 1) // 2 for side in box)
    around = _window(cover, middle_x, middle_y).ravel()
    bank = _bank()
    # einsum, not @: on a busy machine BLAS's threads cost more than so small a product
    best = int((bank.squares - 2 * np.einsum("tk,k->t", bank.masks, around)).argmin())
    shape, size, dx, dy = bank.meaning[best]
    outside = np.count_nonzero(mine) - np.count_nonzero(_window(mine, middle_x, middle_y))
    alike = np.corrcoef(bank.masks[best], around)[0, 1] >= ALIKE and outside < SPECK
    return Seen(
        shape=shape if alike else UNCLEAR,
        colour=COLOURS[index] if sure else UNCLEAR,
        size=size,
        x=middle_x + dx,
        y=middle_y + dy,
    )


def _window(field: NDArray[T], x: int, y: int) -> NDArray[T]:
    """The WINDOW pixels around x, y, zero beyond the canvas."""
    return np.pad(field, WINDOW // 2)[y : y + WINDOW, x : x + WINDOW]


def _colour(offset: Floats, kind: NDArray[np.intp], mine: NDArray[np.bool_]) -> tuple[int, bool]:
    """The palette colour nearest to the object's mean, by number, and whether the object really has it."""
    inner = ndimage.binary_erosion(mine)
    # the arms of a small star have no inside
    core = inner if np.count_nonzero(inner) >= 5 else mine
    _, left = _mixture(offset[core].mean(axis=0), VEIL)
    index = int(left.argmin())
    agreed = np.count_nonzero(kind[core] == index) / np.count_nonzero(core)
    return index, bool(left[index] <= NEAR and agreed >= AGREED)
