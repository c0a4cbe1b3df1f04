"""MetaQuery's connector: what a reader says at the places of the queries, to the condition of a painter.

An encoder at the reader's width, then a projection: Pan et al. 2025, arXiv 2504.06256, section 3;
docs/originals/metaquery.md, "Connector". Its QK norm comes after the rotary embedding, and its last norm has another
epsilon.

Axes: B batch, N queries, D model (the reader's), H heads, K head, F hidden, C the painter's caption.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.checkpoint.keymap import equal_slices, renames
from unimm.kernels import AttentionMask, KeyRange, attention
from unimm.nn.layers import RMSNorm, SwiGLU
from unimm.nn.rope import apply_rope, rope_cos_sin

ROPE_THETA = 10000.0
BLOCK_NORM_EPS, FINAL_NORM_EPS, L2_NORM_EPS = (
    1e-6,
    1e-5,
    1e-12,
)  # of the layers' norms, the last norm's, and the least length of a head
INIT_STD, SANA_CONDITION_SCALE = (
    0.014,
    math.sqrt(5.5),
)  # of linear weights; the last norm's weights, where the painter is a Sana

_BLOCK_KEY_MAP = renames(
    {
        "self_attn.o_proj.weight": "attention.out_proj.weight",
        "self_attn.{}_norm.gamma": "attention.{}_scale",
        "mlp.{}_proj.weight": "mlp.{}.weight",
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "mlp_norm.weight",
    }
) + equal_slices([f"self_attn.{name}_proj.{{}}" for name in "qkv"], "attention.qkv.{}")
CONNECTOR_KEY_MAP = _BLOCK_KEY_MAP.prefixed(released="model.connector.0.layers.{}.", ours="blocks.{}.") + renames(
    {
        "model.connector.1.{}": "fc1.{}",
        "model.connector.3.{}": "fc2.{}",
        "model.connector.4.weight": "norm.weight",
    }
)


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Numbers of the connector: the reader's width, the painter's, and `connector_num_hidden_layers` of the config."""

    dim: int
    condition_dim: int
    n_blocks: int = 24
    head_dim: int = 64
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        if min(self.dim, self.condition_dim, self.head_dim, self.mlp_ratio) < 1 or self.n_blocks < 0:
            raise ValueError(f"got {self}: expected positive numbers")
        if self.dim % self.head_dim or self.head_dim % 2:
            raise ValueError(f"got width {self.dim}, heads of {self.head_dim}: expected a multiple, and even heads")


class ConnectorAttention(nn.Module):
    """Queries and keys are turned by their place first, and only then brought to one length, scaled for each channel."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim, bias=False)
        n_heads = config.dim // config.head_dim
        self.q_scale = nn.Parameter(torch.ones(n_heads, 1, config.head_dim))
        self.k_scale = nn.Parameter(torch.ones(n_heads, 1, config.head_dim))

    def forward(self, x: Tensor, angles: Tensor, mask: AttentionMask) -> Tensor:
        """x [B * N, D], angles [2, B * N, K/2] -> [B * N, D]"""
        q, k, v = rearrange(self.qkv(x), "n (three h k) -> three n h k", three=3, k=self.head_dim)
        q, k = (
            self.scaled_unit_vectors(apply_rope(y, angles), scale)
            for y, scale in ((q, self.q_scale), (k, self.k_scale))
        )
        return self.out_proj(rearrange(attention(q, k, v, mask), "n h k -> n (h k)"))

    def scaled_unit_vectors(self, y: Tensor, scale: Tensor) -> Tensor:
        """y [n, H, K] over its length, times scale [H, 1, K] and sqrt(K)."""
        return F.normalize(y.float(), dim=-1, eps=L2_NORM_EPS).to(y.dtype) * scale[:, 0] * math.sqrt(self.head_dim)


class ConnectorBlock(nn.Module):
    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(config.dim, BLOCK_NORM_EPS), RMSNorm(config.dim, BLOCK_NORM_EPS)
        self.attention = ConnectorAttention(config)
        self.mlp = SwiGLU(config.dim, config.mlp_ratio * config.dim)

    def forward(self, x: Tensor, angles: Tensor, mask: AttentionMask) -> Tensor:
        """x [B * N, D] -> the same"""
        x = x + self.attention(self.attn_norm(x), angles, mask)
        return x + self.mlp(self.mlp_norm(x))


class Connector(nn.Module):
    """Layers in which all queries of a sample see each other; two linear ones; a norm that sets the condition's size."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(ConnectorBlock(config) for _ in range(config.n_blocks))
        self.fc1, self.fc2 = (
            nn.Linear(config.dim, config.condition_dim),
            nn.Linear(config.condition_dim, config.condition_dim),
        )
        self.norm = RMSNorm(config.condition_dim, FINAL_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """The reader's last hidden states at the queries, [B, N, D] -> a condition [B, N, C]."""
        if x.ndim != 3 or x.shape[2] != self.config.dim:
            raise ValueError(f"got hidden states of shape {list(x.shape)}: expected [B, N, {self.config.dim}]")
        batch, n = x.shape[:2]
        mask = AttentionMask([[KeyRange(n, full=True)]] * batch, device=x.device)
        position_ids = torch.arange(n, device=x.device).repeat(batch)
        angles = rope_cos_sin(position_ids, self.config.head_dim, ROPE_THETA, x.dtype)
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, angles, mask)
        x = self.norm(self.fc2(F.gelu(self.fc1(x), approximate="tanh")))
        return rearrange(x, "(B N) C -> B N C", B=batch)

    @torch.no_grad()
    def init_weights(
        self, generator: torch.Generator | None = None, *, condition_scale: float = SANA_CONDITION_SCALE
    ) -> None:
        """The weights that training begins with; scale: of the condition (1 for a UNet of Stable Diffusion)."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=INIT_STD, generator=generator)
            else:
                nn.init.constant_(
                    p, 0.0 if name.endswith("bias") else condition_scale if name == "norm.weight" else 1.0
                )
