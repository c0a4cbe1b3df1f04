"""MetaQuery's connector: the MLLM's hidden states at the queries to the denoiser's condition.

A bidirectional transformer of the MLLM's width, then an MLP to the condition's: Pan et al. 2025, arXiv 2504.06256,
section 3; docs/originals/metaquery.md, "Connector".

Axes: B batch, N queries, D model (the MLLM's), H heads, K head, C channels of the condition.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.kernels import AttentionMask, KeyRange, attention
from unimm.nn.layers import RMSNorm, SwiGLU
from unimm.nn.rope import apply_rope, rope_cos_sin

ROPE_THETA = 10000.0
BLOCK_NORM_EPS = 1e-6
FINAL_NORM_EPS = 1e-5  # the original's last norm has another epsilon than those of its blocks
L2_NORM_EPS = 1e-12
INIT_STD = 0.014  # of linear weights
SANA_CONDITION_SCALE = math.sqrt(5.5)  # initial weight of the last norm, where the denoiser is a Sana


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """dim: the MLLM's width; condition_dim: the denoiser's; n_blocks: `connector_num_hidden_layers` of config.json."""

    dim: int
    condition_dim: int
    n_blocks: int = 24
    head_dim: int = 64
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        if min(self.dim, self.condition_dim, self.head_dim, self.mlp_ratio) < 1 or self.n_blocks < 0:
            raise ValueError(f"got {self}: expected positive numbers")
        if self.dim % self.head_dim or self.head_dim % 2:
            raise ValueError(f"got dim {self.dim}, head_dim {self.head_dim}: expected a multiple, and an even head_dim")


class ConnectorAttention(nn.Module):
    """Attention whose queries and keys are normalized after the rotary embedding, not before it as elsewhere."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim, bias=False)
        n_heads = config.dim // config.head_dim
        self.q_scale = nn.Parameter(torch.ones(n_heads, 1, config.head_dim))
        self.k_scale = nn.Parameter(torch.ones(n_heads, 1, config.head_dim))

    def forward(self, x: Tensor, cos_sin: Tensor, mask: AttentionMask) -> Tensor:
        """x [B * N, D], cos_sin [2, B * N, K/2] -> [B * N, D]"""
        q, k, v = rearrange(self.qkv(x), "n (three h k) -> three n h k", three=3, k=self.head_dim)
        q = self.scaled_unit_vectors(apply_rope(q, cos_sin), self.q_scale)
        k = self.scaled_unit_vectors(apply_rope(k, cos_sin), self.k_scale)
        return self.out_proj(rearrange(attention(q, k, v, mask), "n h k -> n (h k)"))

    def scaled_unit_vectors(self, y: Tensor, scale: Tensor) -> Tensor:
        """y [n, H, K] divided by its L2 norm, times scale [H, 1, K] and sqrt(K)."""
        return F.normalize(y.float(), dim=-1, eps=L2_NORM_EPS).to(y.dtype) * scale[:, 0] * math.sqrt(self.head_dim)


class ConnectorBlock(nn.Module):
    """A pre-norm block of bidirectional attention and a SwiGLU MLP."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, BLOCK_NORM_EPS)
        self.attention = ConnectorAttention(config)
        self.mlp_norm = RMSNorm(config.dim, BLOCK_NORM_EPS)
        self.mlp = SwiGLU(config.dim, config.mlp_ratio * config.dim)

    def forward(self, x: Tensor, cos_sin: Tensor, mask: AttentionMask) -> Tensor:
        """x [B * N, D] -> [B * N, D]"""
        x = x + self.attention(self.attn_norm(x), cos_sin, mask)
        return x + self.mlp(self.mlp_norm(x))


class Connector(nn.Module):
    """Blocks of attention among all queries of a sample, an MLP, and a norm whose weight sets the condition's scale."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(ConnectorBlock(config) for _ in range(config.n_blocks))
        self.fc1 = nn.Linear(config.dim, config.condition_dim)
        self.fc2 = nn.Linear(config.condition_dim, config.condition_dim)
        self.norm = RMSNorm(config.condition_dim, FINAL_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """The MLLM's last hidden states at the queries [B, N, D] -> a condition [B, N, C]."""
        if x.ndim != 3 or x.shape[2] != self.config.dim:
            raise ValueError(f"got hidden states of shape {list(x.shape)}: expected [B, N, {self.config.dim}]")
        batch, n = x.shape[:2]
        mask = AttentionMask([[KeyRange(n, full=True)]] * batch, device=x.device)
        position_ids = torch.arange(n, device=x.device).repeat(batch)
        cos_sin = rope_cos_sin(position_ids, self.config.head_dim, ROPE_THETA, x.dtype)
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, cos_sin, mask)
        x = self.norm(self.fc2(F.gelu(self.fc1(x), approximate="tanh")))
        return rearrange(x, "(B N) C -> B N C", B=batch)

    @torch.no_grad()
    def init_weights(
        self, generator: torch.Generator | None = None, *, condition_scale: float = SANA_CONDITION_SCALE
    ) -> None:
        """Initialize as the original does. condition_scale: 1 for a UNet of Stable Diffusion."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=INIT_STD, generator=generator)
            else:
                nn.init.constant_(
                    p, 0.0 if name.endswith("bias") else condition_scale if name == "norm.weight" else 1.0
                )
