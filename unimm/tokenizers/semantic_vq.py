"""Janus's semantic tokenizer (arXiv 2410.13848, appendix A): a VQ autoencoder whose codes also predict an encoder's
features.

A causal transformer over the codes, in raster order, predicts at every code the feature that a frozen encoder (SigLIP)
has there. A language model understands the image by these features.

Axes: B images, E features of a code, h w grid, n = h * w codes of an image, N = B * n, D model, H heads, K head,
F features of the encoder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from unimm.checkpoint.config_io import JsonConfig, JsonLayout, LayerCount, PositiveInt
from unimm.kernels import AttentionMask, KeyRange, attention
from unimm.nn.pos_embed import grid_position_ids
from unimm.tokenizers.vq import VQConfig, VQModel


@dataclass(frozen=True, kw_only=True)
class SemanticBranchConfig(JsonConfig):
    """Numbers of the transformer over codes."""

    code_dim: PositiveInt
    dim: PositiveInt
    n_layers: LayerCount
    n_heads: PositiveInt
    mlp_dim: PositiveInt
    side: PositiveInt  # of the grid of positions
    out_dim: PositiveInt  # width of the predicted features

    JSON: ClassVar = JsonLayout(name="the config of the semantic branch", source="semantic_config.json")

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1 or self.dim % self.n_heads:
            raise ValueError(
                f"got {self}, expected positive numbers and a dim that is a multiple of n_heads: correct the config"
            )


class SemanticBlock(nn.Module):
    """Pre-norm causal attention over the codes of each image, then the feed-forward."""

    def __init__(self, config: SemanticBranchConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        self.attn_norm = nn.LayerNorm(config.dim)
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.mlp_norm = nn.LayerNorm(config.dim)
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """x [N, D] -> [N, D]"""
        y = self.attn_norm(x)
        q, k, v = (rearrange(part(y), "N (H K) -> N H K", K=self.head_dim) for part in (self.q, self.k, self.v))
        x = x + self.o(rearrange(attention(q, k, v, mask), "N H K -> N (H K)"))
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))


class SemanticBranch(nn.Module):
    """Codes to the predicted features of an encoder."""

    def __init__(self, config: SemanticBranchConfig) -> None:
        super().__init__()
        self.config = config
        self.inward = nn.Linear(config.code_dim, config.dim)
        self.positions = nn.Embedding(config.side**2, config.dim)
        self.layers = nn.ModuleList(SemanticBlock(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.outward = nn.Linear(config.dim, config.out_dim)

    def forward(self, codes: Tensor) -> Tensor:
        """codes [B, E, h, w] -> features [B, n, F]"""
        n_images, _, height, width = codes.shape
        where = grid_position_ids(height, width, self.config.side).to(codes.device)
        mask = AttentionMask([[KeyRange(height * width)]] * n_images, device=codes.device)
        x = self.inward(rearrange(codes, "B E h w -> (B h w) E")) + self.positions(
            repeat(where, "n -> (B n)", B=n_images)
        )
        for layer in self.layers:
            x = layer(x, mask)
        return rearrange(self.outward(self.norm(x)), "(B n) F -> B n F", B=n_images)


class SemanticVQ(nn.Module):
    """A VQ autoencoder and the branch over its codes."""

    def __init__(self, vq: VQConfig, branch: SemanticBranchConfig) -> None:
        super().__init__()
        if branch.code_dim != vq.code_dim:
            raise ValueError(
                f"got a branch for codes of {branch.code_dim}, expected {vq.code_dim}, the width of the codebook"
            )
        self.vq = VQModel(vq)
        self.branch = SemanticBranch(branch)

    def features(self, ids: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """ids [B, n] of a grid (h, w) -> features [B, n, F] to understand the image by."""
        return self.branch(self.vq.quantize.lookup(ids, grid))
