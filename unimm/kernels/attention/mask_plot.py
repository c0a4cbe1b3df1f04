"""An attention mask as an image: query rows over key columns."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from unimm.kernels.attention.mask import AttentionMask

Pixels = NDArray[np.uint8]

BACKGROUND = (255, 255, 255)
MASKED = (233, 233, 233)
# the colour of an attended key, by its range
CAUSAL = (47, 93, 145)
FULL = (217, 119, 42)
INVISIBLE = (63, 142, 92)
PARTIAL = 0.55  # how far a partly visible tile fades to the background, where tiles are marked


def plot_mask(mask: "AttentionMask", *, size: int = 480, tiles: tuple[int, int] | None = None) -> Image.Image:
    """Plot a mask at most `size` pixels wide: a cell per pair, or a pixel for the pair at its middle in larger masks.

    Keys that a row attends to are blue (in a causal range), orange (full) or green (invisible to later rows), others
    are grey, and lines part the samples. With `tiles` (rows, keys) each tile has a border, empty tiles, which are never
    visited, are blank, and partly visible ones are pale.
    """
    n = mask.n_queries
    m = mask.n_keys
    if not n or not m:
        raise ValueError(f"got a mask of {n} rows and {m} keys: expected some of each")
    scale = size / max(n, m)
    scale = math.floor(scale) if scale >= 1 else scale
    rows, keys = (_pixel_centers(length, scale) for length in (n, m))
    ranges = mask.spans.ranges()[:, :, keys]
    attended = np.logical_or.reduce((rows[:, None] >= ranges[:, 0, None]) & (rows[:, None] < ranges[:, 1, None]))
    pixels = np.where(attended[..., None], _key_colors(mask)[keys], np.array(MASKED, np.uint8))
    borders: Sequence[Sequence[int]] = (mask.query_starts[1:], mask.key_starts[1:])
    if tiles:
        pixels = _mark_tiles(mask, pixels, rows, keys, tiles)
        borders = [range(step, length, step) for step, length in zip(tiles, (n, m), strict=True)]
    if scale >= 3:  # a line between cells
        pixels[::scale] = BACKGROUND
        pixels[:, ::scale] = BACKGROUND
    if scale >= 3 or not tiles:
        for axis, starts in zip((pixels, pixels.swapaxes(0, 1)), borders, strict=True):
            axis[[int(start * scale) for start in starts]] = (0, 0, 0)
    return Image.fromarray(pixels)


def _pixel_centers(length: int, scale: float) -> NDArray[np.int64]:
    """The row (or key) at the middle of each pixel of a side."""
    at = (np.arange(max(1, round(length * scale))) + 0.5) / scale
    return np.minimum(at.astype(np.int64), length - 1)


def _key_colors(mask: "AttentionMask") -> Pixels:
    """The colour of each key, [M, 3]."""
    colors = np.full((mask.n_keys, 3), CAUSAL, np.uint8)
    for key_ranges, start in zip(mask.samples, mask.key_starts, strict=True):
        for one in key_ranges:
            colors[start : start + one.length] = (FULL if one.full else CAUSAL) if one.visible else INVISIBLE
            start += one.length
    return colors


def _mark_tiles(
    mask: "AttentionMask", pixels: Pixels, rows: NDArray[np.int64], keys: NDArray[np.int64], size: tuple[int, int]
) -> Pixels:
    """Pixels of empty tiles blank, those of partly visible tiles pale."""
    full, partial = mask.spans.tile_visibility(*size)
    at = np.ix_(rows // size[0], keys // size[1])
    pale = (pixels * (1 - PARTIAL) + 255 * PARTIAL).astype(np.uint8)
    pixels = np.where(partial[at][..., None], pale, pixels)
    return np.where((full | partial)[at][..., None], pixels, np.array(BACKGROUND, np.uint8))
