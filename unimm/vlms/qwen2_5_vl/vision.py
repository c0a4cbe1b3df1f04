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

from unimm.kernels import Block as Span
from unimm.kernels import Mask, attention
from unimm.nn.layers import MLP, RMSNorm, SwiGLU
from unimm.nn.rope import apply_rope, rope
from unimm.processing.images.qwen2_vl import Grid
from unimm.vlms.qwen2_5_vl.config import THETA, QwenVisionConfig

EPS = 1e-6


def cells(grid: Grid, merge: int) -> Tensor:
    """Where the cells of a grid of patches lie, (frame, row, column) [n, 3] in raster order."""
    t, h, w = grid
    return torch.cartesian_prod(torch.arange(t), torch.arange(h // merge), torch.arange(w // merge))


def windows(places: Sequence[Tensor], span: int) -> tuple[Tensor, list[int]]:
    """Cells of pictures [n, 3] each -> their order window by window [n of all], and the cells of each window.

    Windows are squares of span * span cells from the top left; those at the right and the bottom may be cut.
    """
    orders, lengths, at = [], [], 0
    for place in places:
        window = torch.cat((place[:, :1], place[:, 1:] // span), 1)
        _, which, counts = window.unique(dim=0, return_inverse=True, return_counts=True)
        orders.append(at + which.argsort(stable=True))
        lengths += counts.tolist()
        at += len(place)
    return torch.cat(orders), lengths


class QwenVisionBlock(nn.Module):
    """Pre-norm attention under a mask, then the feed-forward."""

    def __init__(self, cfg: QwenVisionConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.attn_norm = RMSNorm(cfg.dim, EPS)
        self.qkv, self.o = nn.Linear(cfg.dim, 3 * cfg.dim), nn.Linear(cfg.dim, cfg.dim)
        self.mlp_norm = RMSNorm(cfg.dim, EPS)
        self.mlp = SwiGLU(cfg.dim, cfg.mlp_dim, cfg.act, bias=True)

    def forward(self, x: Tensor, angles: Tensor, mask: Mask) -> Tensor:
        """x [N, D], angles [2, N, K/2] float32 -> [N, D]."""
        q, k, v = rearrange(self.qkv(self.attn_norm(x)), "n (three h k) -> three n h k", three=3, h=self.n_heads)
        q, k = (apply_rope(t.float(), angles).to(v.dtype) for t in (q, k))
        x = x + self.o(rearrange(attention(q, k, v, mask), "n h k -> n (h k)"))
        return x + self.mlp(self.mlp_norm(x))


class Merger(nn.Module):
    """The patches of a cell, normed and put side by side, to a row of the language model."""

    def __init__(self, cfg: QwenVisionConfig):
        super().__init__()
        self.cell, wide = cfg.merge**2, cfg.dim * cfg.merge**2
        self.norm, self.mlp = RMSNorm(cfg.dim, EPS), MLP(wide, wide, cfg.out, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] -> [n, E]."""
        return self.mlp(rearrange(self.norm(x), "(n s) d -> n (s d)", s=self.cell))


class QwenVision(nn.Module):
    """Patches of pictures of any size -> a row for each of their cells. Pictures of a pack do not see each other."""

    def __init__(self, cfg: QwenVisionConfig):
        super().__init__()
        self.cfg = cfg
        # a linear map of whole patches, which the released files hold as a convolution
        self.patch = nn.Conv3d(cfg.channels, cfg.dim, (cfg.frames, cfg.patch, cfg.patch), bias=False)
        self.blocks = nn.ModuleList(QwenVisionBlock(cfg) for _ in range(cfg.n_layers))
        self.merger = Merger(cfg)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """patches [N, C*T*p*p] in `SmartResize.patches`' order, a grid for each picture -> [n, E], cells in raster order."""
        cfg, device, s = self.cfg, patches.device, self.cfg.merge**2
        places = [cells(grid, cfg.merge) for grid in grids]
        order, lengths = windows(places, cfg.span)
        order = order.to(device)
        x = F.linear(patches, self.patch.weight.flatten(1))
        x = rearrange(rearrange(x, "(n s) d -> n s d", s=s)[order], "n s d -> (n s) d")
        angles = self.turns(torch.cat(places).to(device)[order])
        inside = Mask([[Span(n * s, full=True)] for n in lengths], device=device)
        whole = Mask([[Span(h * w, full=True)] for t, h, w in grids for _ in range(t)], device=device)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, whole if layer in cfg.full else inside)
        return self.merger(x)[order.argsort()]

    def turns(self, places: Tensor) -> Tensor:
        """Rotary angles [2, N, K/2] float32 of the patches of cells at (frame, row, column) [n, 3]: rows, then columns."""
        m, half = self.cfg.merge, self.cfg.dim // self.cfg.n_heads // 2
        inside = torch.cartesian_prod(*[torch.arange(m, device=places.device)] * 2)
        at = rearrange(repeat(places[:, 1:] * m, "n two -> n s two", s=m * m) + inside, "n s two -> (n s) two")
        return torch.cat([rope(axis, half, THETA, torch.float32) for axis in at.unbind(1)], -1)
