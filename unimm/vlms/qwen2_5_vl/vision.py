"""Qwen2.5-VL's vision encoder: images of any size, attention inside windows, and over whole frames in a few layers.

Bai et al. 2025, arXiv 2502.13923, section 2.1.1. The numbers that no config holds: docs/originals/blocks.md, "Vision
encoder". A cell is a square of merge * merge patches, which become one row of the language model.

Axes: N packed patches, n packed cells, s patches of a cell, D model, H heads, K head, E width of the language model;
C channels, T frames of a patch, p patch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from unimm.kernels import AttentionMask, KeyRange, attention
from unimm.nn.layers import MLP, RMSNorm, SwiGLU
from unimm.nn.rope import apply_rope, rope_cos_sin
from unimm.processing.images.qwen2_vl import PatchGrid
from unimm.vlms.qwen2_5_vl.config import VISION_ROPE_THETA, QwenVisionConfig

NORM_EPS = 1e-6


def cell_positions(grid: PatchGrid, merge_size: int) -> Tensor:
    """(frame, row, column) of the cells of a grid of patches, [n, 3] in raster order."""
    frames, height, width = grid
    rows = torch.arange(height // merge_size)
    columns = torch.arange(width // merge_size)
    return torch.cartesian_prod(torch.arange(frames), rows, columns)


def window_order(positions: Sequence[Tensor], window_cells: int) -> tuple[Tensor, list[int]]:
    """Positions of the cells of each image [n, 3] -> the order of all cells window by window, and the cells of each
    window.

    Windows are squares of window_cells * window_cells cells from the top left; those at the right and the bottom may be
    smaller.
    """
    orders: list[Tensor] = []
    lengths: list[int] = []
    first = 0
    for cells in positions:
        windows = torch.cat((cells[:, :1], cells[:, 1:] // window_cells), 1)
        _, window_of_cell, counts = windows.unique(dim=0, return_inverse=True, return_counts=True)
        orders.append(first + window_of_cell.argsort(stable=True))
        lengths += counts.tolist()
        first += len(cells)
    return torch.cat(orders), lengths


class QwenVisionBlock(nn.Module):
    """Pre-norm attention under a mask, then the feed-forward."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.attn_norm = RMSNorm(config.dim, NORM_EPS)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim)
        self.mlp_norm = RMSNorm(config.dim, NORM_EPS)
        self.mlp = SwiGLU(config.dim, config.mlp_dim, config.act, bias=True)

    def forward(self, x: Tensor, angles: Tensor, mask: AttentionMask) -> Tensor:
        """x [N, D], angles (cosines and sines) [2, N, K/2] float32 -> [N, D]."""
        q, k, v = rearrange(self.qkv(self.attn_norm(x)), "n (three h k) -> three n h k", three=3, h=self.n_heads)
        q, k = (apply_rope(t.float(), angles).to(v.dtype) for t in (q, k))
        x = x + self.out_proj(rearrange(attention(q, k, v, mask), "n h k -> n (h k)"))
        return x + self.mlp(self.mlp_norm(x))


class PatchMerger(nn.Module):
    """The patches of a cell, normalized and concatenated, to a row of the language model."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.patches_per_cell = config.spatial_merge_size**2
        cell_dim = config.dim * self.patches_per_cell
        self.norm = RMSNorm(config.dim, NORM_EPS)
        self.mlp = MLP(cell_dim, cell_dim, config.out_dim, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] -> [n, E]."""
        return self.mlp(rearrange(self.norm(x), "(n s) d -> n (s d)", s=self.patches_per_cell))


class QwenVisionEncoder(nn.Module):
    """Patches of images of any size -> a row for each of their cells. Images of a batch do not attend to each other."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.config = config
        # a linear map of whole patches, which the released files hold as a convolution
        self.patch_embed = nn.Conv3d(
            config.channels, config.dim, (config.temporal_patch_size, config.patch_size, config.patch_size), bias=False
        )
        self.blocks = nn.ModuleList(QwenVisionBlock(config) for _ in range(config.n_layers))
        self.merger = PatchMerger(config)

    def forward(self, patches: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """patches [N, C*T*p*p] as `to_patches` orders them, a grid for each image -> [n, E], cells in raster order."""
        config = self.config
        device = patches.device
        s = config.spatial_merge_size**2
        positions = [cell_positions(grid, config.spatial_merge_size) for grid in grids]
        order, window_lengths = window_order(positions, config.window_cells)
        order = order.to(device)
        x = F.linear(patches, self.patch_embed.weight.flatten(1))
        x = rearrange(rearrange(x, "(n s) d -> n s d", s=s)[order], "n s d -> (n s) d")
        angles = self.rope_angles(torch.cat(positions).to(device)[order])
        windows = AttentionMask([[KeyRange(n * s, full=True)] for n in window_lengths], device=device)
        frames = AttentionMask([[KeyRange(h * w, full=True)] for t, h, w in grids for _ in range(t)], device=device)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, frames if layer in config.full_attention_layers else windows)
        return self.merger(x)[order.argsort()]

    def rope_angles(self, positions: Tensor) -> Tensor:
        """Cosines and sines [2, N, K/2] float32 of the patches of cells at (frame, row, column) [n, 3]: rows, then
        columns.
        """
        m = self.config.spatial_merge_size
        half = self.config.dim // self.config.n_heads // 2
        inside_cell = torch.cartesian_prod(*[torch.arange(m, device=positions.device)] * 2)
        patches = repeat(positions[:, 1:] * m, "n two -> n s two", s=m * m) + inside_cell
        axes = rearrange(patches, "n s two -> (n s) two").unbind(1)
        return torch.cat([rope_cos_sin(axis, half, VISION_ROPE_THETA, torch.float32) for axis in axes], -1)
