"""A mask as a picture: rows of queries over columns of keys."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from unimm.kernels.attention.mask import AttentionMask

Pixels = NDArray[np.uint8]

BACKGROUND, MASKED = (255, 255, 255), (233, 233, 233)
CAUSAL, FULL, INVISIBLE = (47, 93, 145), (217, 119, 42), (63, 142, 92)  # the colour of a key that is seen, by its block
PARTIAL = 0.55  # how far a partly visible tile fades to paper, where tiles are marked


def plot_mask(mask: "AttentionMask", *, size: int = 480, tiles: tuple[int, int] | None = None) -> Image.Image:
    """Small masks a cell for each pair; larger ones (more rows than pixels) a pixel for the pair at its middle.

    Keys that a row sees are blue (causal block), orange (full) or green (invisible to later rows), those it does not
    see are grey, lines part the samples. With `tiles` (rows, keys) each tile has a border, and the empty ones, which
    are never visited, stay blank; the seen cells of partly visible tiles are pale.
    """
    n, m = mask.n_queries, mask.n_keys
    if not n or not m:
        raise ValueError(f"got a mask of {n} rows and {m} keys: expected some of each")
    scale = size / max(n, m)
    scale = math.floor(scale) if scale >= 1 else scale
    rows, keys = (_pixel_centers(length, scale) for length in (n, m))
    ranges = mask.spans.ranges()[:, :, keys]
    seen = np.logical_or.reduce((rows[:, None] >= ranges[:, 0, None]) & (rows[:, None] < ranges[:, 1, None]))
    pixels = np.where(seen[..., None], _key_colors(mask)[keys], np.array(MASKED, np.uint8))
    borders_at: Sequence[Sequence[int]] = (mask.query_starts[1:], mask.key_starts[1:])
    if tiles:
        pixels = _mark_tiles(mask, pixels, rows, keys, tiles)
        borders_at = [range(step, length, step) for step, length in zip(tiles, (n, m), strict=True)]
    if scale >= 3:  # a line between cells
        pixels[::scale], pixels[:, ::scale] = BACKGROUND, BACKGROUND
    if scale >= 3 or not tiles:
        for axis, starts in zip((pixels, pixels.swapaxes(0, 1)), borders_at, strict=True):
            axis[[int(start * scale) for start in starts]] = (0, 0, 0)
    return Image.fromarray(pixels)


def _pixel_centers(length: int, scale: float) -> NDArray[np.int64]:
    """The row (or key) at the middle of each pixel of a side."""
    at = (np.arange(max(1, round(length * scale))) + 0.5) / scale
    return np.minimum(at.astype(np.int64), length - 1)


def _key_colors(mask: "AttentionMask") -> Pixels:
    """The colour of each key, [M, 3]."""
    colours = np.full((mask.n_keys, 3), CAUSAL, np.uint8)
    for blocks, start in zip(mask.samples, mask.key_starts, strict=True):
        for block in blocks:
            colours[start : start + block.length] = (FULL if block.full else CAUSAL) if block.visible else INVISIBLE
            start += block.length
    return colours


def _mark_tiles(
    mask: "AttentionMask", pixels: Pixels, rows: NDArray[np.int64], keys: NDArray[np.int64], size: tuple[int, int]
) -> Pixels:
    """Pixels of empty tiles blank, those of partly visible tiles pale."""
    full, part = mask.spans.tile_visibility(*size)
    at = np.ix_(rows // size[0], keys // size[1])
    pale = (pixels * (1 - PARTIAL) + 255 * PARTIAL).astype(np.uint8)
    pixels = np.where(part[at][..., None], pale, pixels)
    return np.where((full | part)[at][..., None], pixels, np.array(BACKGROUND, np.uint8))
