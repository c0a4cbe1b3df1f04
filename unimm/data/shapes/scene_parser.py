"""Reads the objects of a picture back from its pixels.

Every pixel is taken as a mixture of the background and one palette colour. Pixels more than half covered form the
objects, which the renderer keeps apart; the shape and size are those of the mask that lies nearest to the object's
coverage, anti-aliased edge and all. What is there but fits no colour or no shape is seen as UNCLEAR, not left out.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from unimm.data.shapes.patches import Mask, connected_components, dilate, erode, pad_zeros
from unimm.data.shapes.world import (
    BACKGROUND,
    COLOURS,
    FULL_COVERAGE,
    IMAGE_SIZE,
    PALETTE,
    SHAPES,
    ImageArray,
    coverage,
)

UNCLEAR = "unclear"
# a patch of fewer pixels is a speck; the smallest object, a small star, has 42 that are more than half covered
MIN_PIXELS = 16
# an object's mean colour may lie this far, in RGB, from a palette colour seen through a veil of at most 1 - VEIL
MAX_COLOUR_DISTANCE = 45.0
MIN_COVER = 0.8
# and must be this much nearer to it than to the next, so that half-way colours are neither
MAX_DISTANCE_RATIO = 0.7
# what lies farther, in RGB, from every mixture, or from the background, is an object too, of none of the colours
OFF_PALETTE_DISTANCE = 40.0
BACKGROUND_DISTANCE = 110.0
# of the pixels inside an object so many must have its colour
MIN_COLOUR_AGREEMENT = 0.6
# least correlation of an object's coverage with the mask; blur and noise leave it high, a wrong outline does not:
# noise of 40 levels 0.90, a ring, an ellipse, half a circle or two circles in one at most 0.89
MIN_CORRELATION = 0.9
# masks are tried at widths between the two sizes as well, so that a size between them does not pass for another shape
TEMPLATE_WIDTHS = {11: "small", 13: "small", 15: "large", 17: "large"}
# and at each width also blurred, by a standard deviation of 1.4 pixels
BLUR = tuple(weight / 256 for weight in (1, 8, 28, 56, 70, 56, 28, 8, 1))
# each mask is tried this far around the middle of the object's bounding box
MAX_SHIFT = 2
WINDOW = max(TEMPLATE_WIDTHS) + 2 * MAX_SHIFT

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ParsedObject:
    """One object read from a picture; x and y are the centre of its box in pixels."""

    shape: str
    colour: str
    size: str
    x: int
    y: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _TemplateBank:
    """Masks at every shift: flat [T, WINDOW * WINDOW], their squares' sums [T], and what each is."""

    templates: Floats
    squares: Floats
    labels: tuple[tuple[str, str, int, int], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _PixelColours:
    """Colours less the background [64, 64, 3], shares of each colour [64, 64, 8], and the likeliest colour [64, 64]."""

    offset: Floats
    share: Floats
    nearest_colour: NDArray[np.intp]


@cache
def _template_bank() -> _TemplateBank:
    """All shapes and sizes, sharp and blurred, at all shifts."""
    masks, meaning = [], []
    shifts = range(-MAX_SHIFT, MAX_SHIFT + 1)
    for shape, (width, size), soft in product(SHAPES, TEMPLATE_WIDTHS.items(), (False, True)):
        mask = np.pad(coverage(shape, width) / FULL_COVERAGE, (WINDOW - width) // 2)
        for axis in (0, 1) if soft else ():
            mask = np.apply_along_axis(np.convolve, axis, mask, BLUR, mode="same")
        for dy, dx in product(shifts, shifts):
            masks.append(np.roll(mask, (dy, dx), axis=(0, 1)).ravel())
            meaning.append((shape, size, dx, dy))
    stack = np.stack(masks).astype(np.float32)
    return _TemplateBank(templates=stack, squares=(stack**2).sum(axis=1), labels=tuple(meaning))


@cache
def _colour_axes() -> tuple[Floats, Floats]:
    """From the background to each colour: unit vectors [8, 3] and lengths [8]."""
    steps = np.array([PALETTE[colour] for colour in COLOURS], np.float32) - np.array(BACKGROUND, np.float32)
    lengths = np.linalg.norm(steps, axis=1)
    return steps / lengths[:, None], lengths


def _unmix(offset: Floats, *, min_share: float) -> tuple[Floats, Floats]:
    """For colours less the background [..., 3]: the share of each palette colour and what it leaves over [..., 8]."""
    axes, lengths = _colour_axes()
    along = offset @ axes.T
    share = np.clip(along / lengths, min_share, 1)
    reached = share * lengths
    left = np.einsum("...c,...c->...", offset, offset)[..., None] + reached * (reached - 2 * along)
    return share, np.sqrt(np.maximum(left, 0))


def parse_scene(image: ImageArray) -> tuple[ParsedObject, ...]:
    """The objects of a picture, uint8 [64, 64, 3], from the top."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"got a picture of {got}, expected uint8 [{IMAGE_SIZE}, {IMAGE_SIZE}, 3]; resize and round it first"
        )
    offset = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
    share, left = _unmix(offset, min_share=0.0)
    kind = left.argmin(axis=-1)
    cover = np.take_along_axis(share, kind[..., None], axis=-1)[..., 0]
    objects = connected_components(cover > 0.5, min_pixels=MIN_PIXELS)
    pixels = _PixelColours(offset=offset, share=share, nearest_colour=kind)
    seen = [_classify(pixels, mine, [other for other in objects if other is not mine]) for mine in objects]
    seen += [_unclear_object(mine) for mine in _unclear_components(offset, objects)]
    return tuple(sorted(seen, key=lambda one: (one.y, one.x)))


def _unclear_components(offset: Floats, objects: list[Mask]) -> list[Mask]:
    """Patches clear of the objects that fit no colour or are too pale for one; means of 3 x 3 pixels, to bear noise."""
    wide = pad_zeros(offset, 1)
    tall = wide[:-2] + wide[1:-1] + wide[2:]
    mean = (tall[:, :-2] + tall[:, 1:-1] + tall[:, 2:]) / 9
    _, left = _unmix(mean, min_share=0.0)
    strange = (left.min(axis=-1) > OFF_PALETTE_DISTANCE) | (
        np.einsum("...c,...c->...", mean, mean) > BACKGROUND_DISTANCE**2
    )
    if objects:
        strange &= ~dilate(dilate(dilate(np.logical_or.reduce(objects))))
    return connected_components(strange, min_pixels=MIN_PIXELS)


def _unclear_object(mine: Mask) -> ParsedObject:
    """An object of which only the place is known."""
    x, y = _box_centre(mine)
    return ParsedObject(shape=UNCLEAR, colour=UNCLEAR, size=UNCLEAR, x=x, y=y)


def _classify(pixels: _PixelColours, mask: Mask, others: list[Mask]) -> ParsedObject:
    """The object on the pixels of mine."""
    index, sure = _classify_colour(pixels, mask)
    cover = pixels.share[..., index]
    # what belongs to another object, and the blur one pixel around it, is none of this one's coverage
    if others:
        cover = np.where(dilate(np.logical_or.reduce(others)) & ~mask, 0, cover)
    x, y = _box_centre(mask)
    around = _window(cover, x, y)
    bank = _template_bank()
    # einsum, not @: on a busy machine BLAS's threads cost more than so small a product
    best = int((bank.squares - 2 * np.einsum("tk,k->t", bank.templates, around)).argmin())
    shape, size, dx, dy = bank.labels[best]
    outside = np.count_nonzero(mask) - np.count_nonzero(_window(mask.astype(np.float32), x, y))
    alike = np.corrcoef(bank.templates[best], around)[0, 1] >= MIN_CORRELATION and outside < MIN_PIXELS
    colour = COLOURS[index] if sure else UNCLEAR
    return ParsedObject(shape=shape if alike else UNCLEAR, colour=colour, size=size, x=x + dx, y=y + dy)


def _box_centre(mask: Mask) -> tuple[int, int]:
    """The middle (x, y) of the mask's bounding box."""
    x, y = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return int(x[0] + x[-1]) // 2, int(y[0] + y[-1]) // 2


def _window(field: Floats, x: int, y: int) -> Floats:
    """The WINDOW x WINDOW pixels around x, y in one row, zero beyond the canvas."""
    return pad_zeros(field, WINDOW // 2)[y : y + WINDOW, x : x + WINDOW].ravel()


def _classify_colour(pixels: _PixelColours, mask: Mask) -> tuple[int, bool]:
    """The palette colour nearest to the object's mean, by number, and whether the object really has it."""
    inner = erode(mask)
    # the arms of a small star have no inside
    core = inner if np.count_nonzero(inner) >= 5 else mask
    _, left = _unmix(pixels.offset[core].mean(axis=0), min_share=MIN_COVER)
    index, second = (int(number) for number in left.argsort()[:2])
    near = left[index] <= min(MAX_COLOUR_DISTANCE, MAX_DISTANCE_RATIO * left[second])
    agreed = np.count_nonzero(pixels.nearest_colour[core] == index) / np.count_nonzero(core)
    return index, bool(near and agreed >= MIN_COLOUR_AGREEMENT)
