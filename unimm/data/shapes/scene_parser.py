"""Reading the objects of an image back from its pixels.

Every pixel is taken as a mixture of the background and one palette colour. Pixels more than half covered form the
objects, which the renderer keeps apart; the shape and size are those of the template nearest to the object's
coverage, anti-aliased edge and all. What is there but fits no colour or no shape is reported as UNCLEAR, not left out.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

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
# a component of fewer pixels is noise; the smallest object, a small star, has 42 that are more than half covered
MIN_PIXELS = 16
# an object's mean colour may lie this far, in RGB, from a palette colour that covers at least MIN_COVER of it
MAX_COLOUR_DISTANCE = 45.0
MIN_COVER = 0.8
# and must be this much nearer to it than to the next, so that half-way colours are neither
MAX_DISTANCE_RATIO = 0.7
# what lies farther, in RGB, from every mixture, or from the background, is an object too, of none of the colours
OFF_PALETTE_DISTANCE = 40.0
BACKGROUND_DISTANCE = 110.0
# of the pixels inside an object so many must have its colour
MIN_COLOUR_AGREEMENT = 0.6
# least correlation of an object's coverage with the template; blur and noise leave it high, a wrong outline does not:
# noise of 40 levels 0.90, a ring, an ellipse, half a circle or two circles in one at most 0.89
MIN_CORRELATION = 0.9
# templates have widths between the two sizes as well, so that a size between them does not pass for another shape
TEMPLATE_WIDTHS = {11: "small", 13: "small", 15: "large", 17: "large"}
# and at each width also a blurred one, by a standard deviation of 1.4 pixels
BLUR = tuple(weight / 256 for weight in (1, 8, 28, 56, 70, 56, 28, 8, 1))
# each template is tried this far around the centre of the object's bounding box
MAX_SHIFT = 2
WINDOW = max(TEMPLATE_WIDTHS) + 2 * MAX_SHIFT

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
T = TypeVar("T", bound=np.generic)
EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


@dataclass(frozen=True, kw_only=True)
class ParsedObject:
    """One object read from an image; x and y are the centre of its bounding box in pixels."""

    shape: str
    colour: str
    size: str
    x: int
    y: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _TemplateBank:
    """Templates at every shift: flat [M, WINDOW * WINDOW], the sums of their squares [M], and what each one shows."""

    templates: Floats
    squares: Floats
    labels: tuple[tuple[str, str, int, int], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _PixelColours:
    """Colours less the background [64, 64, 3], shares of each colour [64, 64, 8], index of the nearest [64, 64]."""

    offset: Floats
    share: Floats
    nearest_colour: NDArray[np.intp]


def parse_scene(image: ImageArray) -> tuple[ParsedObject, ...]:
    """The objects of an image, uint8 [64, 64, 3], from the top. Raises ValueError for another type or shape."""
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != shape:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"got an image of {got}, expected uint8 {list(shape)}: resize and round it first")
    offset = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
    share, residual = _unmix(offset, min_share=0.0)
    nearest = residual.argmin(axis=-1)
    cover = np.take_along_axis(share, nearest[..., None], axis=-1)[..., 0]
    masks = connected_components(cover > 0.5, min_pixels=MIN_PIXELS)
    pixels = _PixelColours(offset=offset, share=share, nearest_colour=nearest)
    found = [_classify(pixels, mask, [other for other in masks if other is not mask]) for mask in masks]
    found += [_unclear_object(mask) for mask in _unclear_components(offset, masks)]
    return tuple(sorted(found, key=lambda one: (one.y, one.x)))


def connected_components(mask: Mask, *, min_pixels: int) -> list[Mask]:
    """The parts of mask [h, w] that are connected along edges, of at least so many pixels, each as a mask."""
    labels, n = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    return [labels == i for i in range(1, n + 1) if sizes[i] >= min_pixels]


def dilate(mask: Mask, times: int = 1) -> Mask:
    """The mask and its eight neighbours, so many times."""
    return ndimage.binary_dilation(mask, EIGHT_NEIGHBOURS, iterations=times)


def erode(mask: Mask) -> Mask:
    """The pixels whose four neighbours are in the mask, too."""
    return ndimage.binary_erosion(mask)


def pad_zeros(field: NDArray[T], border: int) -> NDArray[T]:
    """The field [h, w, ...] with zeros around it; np.pad takes ten times as long."""
    height, width = field.shape[:2]
    padded = np.zeros((height + 2 * border, width + 2 * border, *field.shape[2:]), field.dtype)
    padded[border:-border, border:-border] = field
    return padded


@cache
def _template_bank() -> _TemplateBank:
    """All shapes and sizes, sharp and blurred, at all shifts."""
    templates = []
    labels = []
    shifts = range(-MAX_SHIFT, MAX_SHIFT + 1)
    for shape, (width, size), blurred in product(SHAPES, TEMPLATE_WIDTHS.items(), (False, True)):
        template = np.pad(coverage(shape, width) / FULL_COVERAGE, (WINDOW - width) // 2)
        for axis in (0, 1) if blurred else ():
            template = np.apply_along_axis(np.convolve, axis, template, BLUR, mode="same")
        for dy, dx in product(shifts, shifts):
            templates.append(np.roll(template, (dy, dx), axis=(0, 1)).ravel())
            labels.append((shape, size, dx, dy))
    stack = np.stack(templates).astype(np.float32)
    return _TemplateBank(templates=stack, squares=(stack**2).sum(axis=1), labels=tuple(labels))


@cache
def _colour_axes() -> tuple[Floats, Floats]:
    """From the background to each colour: unit vectors [8, 3] and lengths [8]."""
    steps = np.array([PALETTE[colour] for colour in COLOURS], np.float32) - np.array(BACKGROUND, np.float32)
    lengths = np.linalg.norm(steps, axis=1)
    return steps / lengths[:, None], lengths


def _unmix(offset: Floats, *, min_share: float) -> tuple[Floats, Floats]:
    """Colours less the background [..., 3] -> shares of the palette's colours, and distances to them [..., 8]."""
    axes, lengths = _colour_axes()
    along = offset @ axes.T
    share = np.clip(along / lengths, min_share, 1)
    reached = share * lengths
    squared = np.einsum("...c,...c->...", offset, offset)[..., None] + reached * (reached - 2 * along)
    return share, np.sqrt(np.maximum(squared, 0))


def _unclear_components(offset: Floats, masks: list[Mask]) -> list[Mask]:
    """Components apart from the objects that fit no colour or are too pale for one; 3 x 3 means are robust to noise."""
    padded = pad_zeros(offset, 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    mean = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
    _, residual = _unmix(mean, min_share=0.0)
    off_palette = residual.min(axis=-1) > OFF_PALETTE_DISTANCE
    unclear = off_palette | (np.einsum("...c,...c->...", mean, mean) > BACKGROUND_DISTANCE**2)
    if masks:
        unclear &= ~dilate(np.logical_or.reduce(masks), 3)
    return connected_components(unclear, min_pixels=MIN_PIXELS)


def _unclear_object(mask: Mask) -> ParsedObject:
    """An object of which only the place is known."""
    x, y = _box_centre(mask)
    return ParsedObject(shape=UNCLEAR, colour=UNCLEAR, size=UNCLEAR, x=x, y=y)


def _classify(pixels: _PixelColours, mask: Mask, others: list[Mask]) -> ParsedObject:
    """The object on the pixels of the mask, given the masks of the other objects."""
    index, is_sure = _classify_colour(pixels, mask)
    cover = pixels.share[..., index]
    # what belongs to another object, and the blur one pixel around it, is none of this one's coverage
    if others:
        cover = np.where(dilate(np.logical_or.reduce(others)) & ~mask, 0, cover)
    x, y = _box_centre(mask)
    window = _window(cover, x, y)
    bank = _template_bank()
    # einsum, not @: on a busy machine BLAS's threads cost more than so small a product
    best = int((bank.squares - 2 * np.einsum("tk,k->t", bank.templates, window)).argmin())
    shape, size, dx, dy = bank.labels[best]
    outside = np.count_nonzero(mask) - np.count_nonzero(_window(mask.astype(np.float32), x, y))
    fits = np.corrcoef(bank.templates[best], window)[0, 1] >= MIN_CORRELATION and outside < MIN_PIXELS
    colour = COLOURS[index] if is_sure else UNCLEAR
    return ParsedObject(shape=shape if fits else UNCLEAR, colour=colour, size=size, x=x + dx, y=y + dy)


def _box_centre(mask: Mask) -> tuple[int, int]:
    """The centre (x, y) of the mask's bounding box."""
    x, y = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return int(x[0] + x[-1]) // 2, int(y[0] + y[-1]) // 2


def _window(field: Floats, x: int, y: int) -> Floats:
    """The WINDOW x WINDOW pixels around x, y in one row, zero beyond the canvas."""
    return pad_zeros(field, WINDOW // 2)[y : y + WINDOW, x : x + WINDOW].ravel()


def _classify_colour(pixels: _PixelColours, mask: Mask) -> tuple[int, bool]:
    """The index of the palette colour nearest to the object's mean, and whether the object really has it."""
    inner = erode(mask)
    # the arms of a small star have no inside
    core = inner if np.count_nonzero(inner) >= 5 else mask
    _, residual = _unmix(pixels.offset[core].mean(axis=0), min_share=MIN_COVER)
    index, second = (int(number) for number in residual.argsort()[:2])
    is_near = residual[index] <= min(MAX_COLOUR_DISTANCE, MAX_DISTANCE_RATIO * residual[second])
    agreement = np.count_nonzero(pixels.nearest_colour[core] == index) / np.count_nonzero(core)
    return index, bool(is_near and agreement >= MIN_COLOUR_AGREEMENT)
