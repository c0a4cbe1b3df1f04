"""Qwen2.5-VL's vision tower: pictures of any size, attention inside windows, all of a frame seen in a few layers.

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
    """Where the cells of a grid of patches lie, (frame, row, column) [n, 3] in raster order."""
    t, h, w = grid
    return torch.cartesian_prod(torch.arange(t), torch.arange(h // merge_size), torch.arange(w // merge_size))


def window_order(positions: Sequence[Tensor], window_cells: int) -> tuple[Tensor, list[int]]:
    """Cells of pictures [n, 3] each -> their order window by window [n of all], and the cells of each window.

    Windows are squares of span * span cells from the top left; those at the right and the bottom may be cut.
    """
    orders, lengths, at = [], [], 0
    for place in positions:
        window = torch.cat((place[:, :1], place[:, 1:] // window_cells), 1)
        _, which, counts = window.unique(dim=0, return_inverse=True, return_counts=True)
        orders.append(at + which.argsort(stable=True))
        lengths += counts.tolist()
        at += len(place)
    return torch.cat(orders), lengths


class QwenVisionBlock(nn.Module):
    """Pre-norm attention under a mask, then the feed-forward."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.attn_norm = RMSNorm(config.dim, NORM_EPS)
        self.qkv, self.out_proj = nn.Linear(config.dim, 3 * config.dim), nn.Linear(config.dim, config.dim)
        self.mlp_norm = RMSNorm(config.dim, NORM_EPS)
        self.mlp = SwiGLU(config.dim, config.mlp_dim, config.act, bias=True)

    def forward(self, x: Tensor, angles: Tensor, mask: AttentionMask) -> Tensor:
        """x [N, D], angles [2, N, K/2] float32 -> [N, D]."""
        q, k, v = rearrange(self.qkv(self.attn_norm(x)), "n (three h k) -> three n h k", three=3, h=self.n_heads)
        q, k = (apply_rope(t.float(), angles).to(v.dtype) for t in (q, k))
        x = x + self.out_proj(rearrange(attention(q, k, v, mask), "n h k -> n (h k)"))
        return x + self.mlp(self.mlp_norm(x))


class PatchMerger(nn.Module):
    """The patches of a cell, normed and put side by side, to a row of the language model."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.patches_per_cell, wide = config.spatial_merge_size**2, config.dim * config.spatial_merge_size**2
        self.norm, self.mlp = RMSNorm(config.dim, NORM_EPS), MLP(wide, wide, config.out_dim, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] -> [n, E]."""
        return self.mlp(rearrange(self.norm(x), "(n s) d -> n (s d)", s=self.patches_per_cell))


class QwenVisionEncoder(nn.Module):
    """Patches of pictures of any size -> a row for each of their cells. Pictures of a pack do not see each other."""

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
        """patches [N, C*T*p*p] in `SmartResize.patches`' order, a grid for each picture -> [n, E], cells in raster order."""
        cfg, device, s = self.config, patches.device, self.config.spatial_merge_size**2
        places = [cell_positions(grid, cfg.spatial_merge_size) for grid in grids]
        order, lengths = window_order(places, cfg.window_cells)
        order = order.to(device)
        x = F.linear(patches, self.patch_embed.weight.flatten(1))
        x = rearrange(rearrange(x, "(n s) d -> n s d", s=s)[order], "n s d -> (n s) d")
        angles = self.rope_angles(torch.cat(places).to(device)[order])
        inside = AttentionMask([[KeyRange(n * s, full=True)] for n in lengths], device=device)
        whole = AttentionMask([[KeyRange(h * w, full=True)] for t, h, w in grids for _ in range(t)], device=device)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, whole if layer in cfg.full_attention_layers else inside)
        return self.merger(x)[order.argsort()]

    def rope_angles(self, positions: Tensor) -> Tensor:
        """Rotary angles [2, N, K/2] float32 of the patches of cells at (frame, row, column) [n, 3]: rows, then columns."""
        m, half = self.config.spatial_merge_size, self.config.dim // self.config.n_heads // 2
        inside = torch.cartesian_prod(*[torch.arange(m, device=positions.device)] * 2)
        at = rearrange(repeat(positions[:, 1:] * m, "n two -> n s two", s=m * m) + inside, "n s two -> (n s) two")
        return torch.cat([rope_cos_sin(axis, half, VISION_ROPE_THETA, torch.float32) for axis in at.unbind(1)], -1)
