"""Images to patches and back, and the position ids of a grid of patches."""

import torch
from einops import rearrange
from torch import Tensor


def patchify(x: Tensor, patch: int) -> Tensor:
    """[C, h, w] -> [n, p*p*C]: patches in raster order, features ordered (row in patch, column in patch, channel)."""
    return rearrange(x, "c (h p) (w q) -> (h w) (p q c)", p=patch, q=patch)


def unpatchify(x: Tensor, patch: int, height: int) -> Tensor:
    """The inverse: [n, p*p*C] -> [C, h, w], `height` patches high."""
    return rearrange(x, "(h w) (p q c) -> c (h p) (w q)", h=height, p=patch, q=patch)


def grid_position_ids(height: int, width: int, table_side: int, *, interpolate: bool = False) -> Tensor:
    """Position ids [n], in raster order, of a grid of height x width patches in a table of table_side x table_side.

    Those of the table's top-left corner; with `interpolate`, the nearest ones of the whole table. Raises ValueError for a grid
    that the table cannot hold: the original's row * side + column would run into the next row unseen.
    """
    if not interpolate and max(height, width) > table_side:
        raise ValueError(
            f"got {height}x{width} patches: the position table holds at most {table_side}x{table_side}; use a smaller image"
        )
    if interpolate:
        edges = torch.arange(1 / table_side, 1.0, 1 / table_side)
        row, column = (torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n), edges, right=True) for n in (height, width))
    else:
        row = torch.arange(height)
        column = torch.arange(width)
    return (row[:, None] * table_side + column).flatten()
