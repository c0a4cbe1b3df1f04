"""Position ids of grids of patches, and fixed position embeddings for them."""

import torch
from einops import rearrange
from torch import Tensor


def sincos_pos_embed_2d(side: int, dim: int) -> Tensor:
    """A fixed table of positions for a square grid, [side * side, D]: of (row, column) the column comes first.

    concat(E(column), E(row)), E(p) = concat(sin(p w), cos(p w)), w_i = 10000^(-i / (D/4)); in float64, then float32.
    The released code names the two halves the other way round; its stored tables are as here.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat((angles.sin(), angles.cos()), -1)  # [side, D/2]
    row = line[:, None].expand(-1, side, -1)
    column = line[None].expand(side, -1, -1)
    return rearrange(torch.cat((column, row), -1), "h w d -> (h w) d").float()


def grid_position_ids(height: int, width: int, table_side: int, *, interpolate: bool = False) -> Tensor:
    """Position ids [n], in raster order, of a grid of height x width patches in a table of table_side x table_side.

    Those of the table's top-left corner; with `interpolate`, the nearest ones of the whole table. Raises ValueError for
    a grid that the table cannot hold: the original's row * side + column would run into the next row unseen.
    """
    if not interpolate and max(height, width) > table_side:
        raise ValueError(
            f"got {height}x{width} patches: the position table holds at most {table_side}x{table_side}; use a smaller "
            "image"
        )
    if interpolate:
        edges = torch.arange(1 / table_side, 1.0, 1 / table_side)
        row, column = (torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n), edges, right=True) for n in (height, width))
    else:
        row = torch.arange(height)
        column = torch.arange(width)
    return (row[:, None] * table_side + column).flatten()
