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

from unimm.data.shapes.patches import Mask, framed, grown, patches, shrunk
from unimm.data.shapes.world import BACKGROUND, COLOURS, FULL, PALETTE, SHAPES, SIDE, Picture, coverage

UNCLEAR = "unclear"
# a patch of fewer pixels is a speck; the smallest object, a small star, has 42 that are more than half covered
SPECK = 16
# an object's mean colour may lie this far, in RGB, from a palette colour seen through a veil of at most 1 - VEIL
NEAR = 45.0
VEIL = 0.8
# and must be this much nearer to it than to the next, so that half-way colours are neither
NEARER = 0.7
# what lies farther, in RGB, from every mixture, or from the background, is an object too, of none of the colours
STRANGE = 40.0
VISIBLE = 110.0
# of the pixels inside an object so many must have its colour
AGREED = 0.6
# least correlation of an object's coverage with the mask; blur and noise leave it high, a wrong outline does not:
# noise of 40 levels 0.90, a ring, an ellipse, half a circle or two circles in one at most 0.89
ALIKE = 0.9
# masks are tried at widths between the two sizes as well, so that a size between them does not pass for another shape
TRIED = {11: "small", 13: "small", 15: "large", 17: "large"}
# and at each width also blurred, by a standard deviation of 1.4 pixels
BLUR = tuple(weight / 256 for weight in (1, 8, 28, 56, 70, 56, 28, 8, 1))
# each mask is tried this far around the middle of the object's bounding box
REACH = 2
WINDOW = max(TRIED) + 2 * REACH

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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pixels:
    """Colours less the background [64, 64, 3], shares of each colour [64, 64, 8], and the likeliest colour [64, 64]."""

    offset: Floats
    share: Floats
    kind: NDArray[np.intp]


@cache
def _bank() -> _Bank:
    """All shapes and sizes, sharp and blurred, at all shifts."""
    masks, meaning = [], []
    shifts = range(-REACH, REACH + 1)
    for shape, (width, size), soft in product(SHAPES, TRIED.items(), (False, True)):
        mask = np.pad(coverage(shape, width) / FULL, (WINDOW - width) // 2)
        for axis in (0, 1) if soft else ():
            mask = np.apply_along_axis(np.convolve, axis, mask, BLUR, mode="same")
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


def _mixture(offset: Floats, *, least: float) -> tuple[Floats, Floats]:
    """For colours less the background [..., 3]: the share of each palette colour and what it leaves over [..., 8]."""
    axes, lengths = _axes()
    along = offset @ axes.T
    share = np.clip(along / lengths, least, 1)
    reached = share * lengths
    left = np.einsum("...c,...c->...", offset, offset)[..., None] + reached * (reached - 2 * along)
    return share, np.sqrt(np.maximum(left, 0))


def read(image: Picture) -> tuple[Seen, ...]:
    """The objects of a picture, uint8 [64, 64, 3], from the top."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != (SIDE, SIDE, 3):
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"got a picture of {got}, expected uint8 [{SIDE}, {SIDE}, 3]; resize and round it first")
    offset = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
    share, left = _mixture(offset, least=0.0)
    kind = left.argmin(axis=-1)
    cover = np.take_along_axis(share, kind[..., None], axis=-1)[..., 0]
    objects = patches(cover > 0.5, least=SPECK)
    pixels = _Pixels(offset=offset, share=share, kind=kind)
    seen = [_identify(pixels, mine, [other for other in objects if other is not mine]) for mine in objects]
    seen += [_stranger(mine) for mine in _strange(offset, objects)]
    return tuple(sorted(seen, key=lambda one: (one.y, one.x)))


def _strange(offset: Floats, objects: list[Mask]) -> list[Mask]:
    """Patches clear of the objects that fit no colour or are too pale for one; means of 3 x 3 pixels, to bear noise."""
    wide = framed(offset, 1)
    tall = wide[:-2] + wide[1:-1] + wide[2:]
    mean = (tall[:, :-2] + tall[:, 1:-1] + tall[:, 2:]) / 9
    _, left = _mixture(mean, least=0.0)
    strange = (left.min(axis=-1) > STRANGE) | (np.einsum("...c,...c->...", mean, mean) > VISIBLE**2)
    if objects:
        strange &= ~grown(grown(grown(np.logical_or.reduce(objects))))
    return patches(strange, least=SPECK)


def _stranger(mine: Mask) -> Seen:
    """An object of which only the place is known."""
    x, y = _middle(mine)
    return Seen(shape=UNCLEAR, colour=UNCLEAR, size=UNCLEAR, x=x, y=y)


def _identify(pixels: _Pixels, mine: Mask, others: list[Mask]) -> Seen:
    """The object on the pixels of mine."""
    index, sure = _colour(pixels, mine)
    cover = pixels.share[..., index]
    # what belongs to another object, and the blur one pixel around it, is none of this one's coverage
    if others:
        cover = np.where(grown(np.logical_or.reduce(others)) & ~mine, 0, cover)
    x, y = _middle(mine)
    around = _window(cover, x, y)
    bank = _bank()
    # einsum, not @: on a busy machine BLAS's threads cost more than so small a product
    best = int((bank.squares - 2 * np.einsum("tk,k->t", bank.masks, around)).argmin())
    shape, size, dx, dy = bank.meaning[best]
    outside = np.count_nonzero(mine) - np.count_nonzero(_window(mine.astype(np.float32), x, y))
    alike = np.corrcoef(bank.masks[best], around)[0, 1] >= ALIKE and outside < SPECK
    colour = COLOURS[index] if sure else UNCLEAR
    return Seen(shape=shape if alike else UNCLEAR, colour=colour, size=size, x=x + dx, y=y + dy)


def _middle(mask: Mask) -> tuple[int, int]:
    """The middle (x, y) of the mask's bounding box."""
    x, y = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return int(x[0] + x[-1]) // 2, int(y[0] + y[-1]) // 2


def _window(field: Floats, x: int, y: int) -> Floats:
    """The WINDOW x WINDOW pixels around x, y in one row, zero beyond the canvas."""
    return framed(field, WINDOW // 2)[y : y + WINDOW, x : x + WINDOW].ravel()


def _colour(pixels: _Pixels, mine: Mask) -> tuple[int, bool]:
    """The palette colour nearest to the object's mean, by number, and whether the object really has it."""
    inner = shrunk(mine)
    # the arms of a small star have no inside
    core = inner if np.count_nonzero(inner) >= 5 else mine
    _, left = _mixture(pixels.offset[core].mean(axis=0), least=VEIL)
    index, second = (int(number) for number in left.argsort()[:2])
    near = left[index] <= min(NEAR, NEARER * left[second])
    agreed = np.count_nonzero(pixels.kind[core] == index) / np.count_nonzero(core)
    return index, bool(near and agreed >= AGREED)
