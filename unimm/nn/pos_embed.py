"""Fixed position embeddings of image grids."""

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
