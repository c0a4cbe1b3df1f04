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

from unimm.checkpoint.keymap import Table
from unimm.kernels import Block as Span
from unimm.kernels import Mask, attention
from unimm.nn.layers import RMSNorm, SwiGLU
from unimm.nn.rope import apply_rope, rope

THETA = 10000.0
LAYER_EPS, OUT_EPS, UNIT_EPS = (
    1e-6,
    1e-5,
    1e-12,
)  # of the layers' norms, the last norm's, and the least length of a head
INIT_STD, SANA_SCALE = 0.014, math.sqrt(5.5)  # of linear weights; the last norm's weights, where the painter is a Sana

# the rows of a layer, under `layers.{}.`
LAYER: Table = {
    **{f"self_attn.{name}_proj.{{}}": f"attention.qkv.{{}}[{i}/3]" for i, name in enumerate("qkv")},
    "self_attn.o_proj.weight": "attention.out.weight",
    "self_attn.{}_norm.gamma": "attention.{}_scale",
    "mlp.{}_proj.weight": "mlp.{}.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
}
KEYS: Table = {
    **{f"model.connector.0.layers.{{}}.{theirs}": f"layers.{{}}.{ours}" for theirs, ours in LAYER.items()},
    "model.connector.1.{}": "fc1.{}",
    "model.connector.3.{}": "fc2.{}",
    "model.connector.4.weight": "norm.weight",
}


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Numbers of the connector: the reader's width, the painter's, and `connector_num_hidden_layers` of the config."""

    dim: int
    out: int
    n_layers: int = 24
    head_dim: int = 64
    expansion: int = 4

    def __post_init__(self) -> None:
        if min(self.dim, self.out, self.head_dim, self.expansion) < 1 or self.n_layers < 0:
            raise ValueError(f"got {self}: expected positive numbers")
        if self.dim % self.head_dim or self.head_dim % 2:
            raise ValueError(f"got width {self.dim}, heads of {self.head_dim}: expected a multiple, and even heads")


class ConnectorAttention(nn.Module):
    """Queries and keys are turned by their place first, and only then brought to one length, scaled for each channel."""

    def __init__(self, cfg: ConnectorConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim)
        self.out = nn.Linear(cfg.dim, cfg.dim, bias=False)
        heads = cfg.dim // cfg.head_dim
        self.q_scale = nn.Parameter(torch.ones(heads, 1, cfg.head_dim))
        self.k_scale = nn.Parameter(torch.ones(heads, 1, cfg.head_dim))

    def forward(self, x: Tensor, angles: Tensor, mask: Mask) -> Tensor:
        """x [B * N, D], angles [2, B * N, K/2] -> [B * N, D]"""
        q, k, v = rearrange(self.qkv(x), "n (three h k) -> three n h k", three=3, k=self.head_dim)
        q, k = (self.unit(apply_rope(y, angles), scale) for y, scale in ((q, self.q_scale), (k, self.k_scale)))
        return self.out(rearrange(attention(q, k, v, mask), "n h k -> n (h k)"))

    def unit(self, y: Tensor, scale: Tensor) -> Tensor:
        """y [n, H, K] over its length, times scale [H, 1, K] and sqrt(K)."""
        return F.normalize(y.float(), dim=-1, eps=UNIT_EPS).to(y.dtype) * scale[:, 0] * math.sqrt(self.head_dim)


class ConnectorLayer(nn.Module):
    def __init__(self, cfg: ConnectorConfig):
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(cfg.dim, LAYER_EPS), RMSNorm(cfg.dim, LAYER_EPS)
        self.attention = ConnectorAttention(cfg)
        self.mlp = SwiGLU(cfg.dim, cfg.expansion * cfg.dim)

    def forward(self, x: Tensor, angles: Tensor, mask: Mask) -> Tensor:
        """x [B * N, D] -> the same"""
        x = x + self.attention(self.attention_norm(x), angles, mask)
        return x + self.mlp(self.mlp_norm(x))


class Connector(nn.Module):
    """Layers in which all queries of a sample see each other; two linear ones; a norm that sets the condition's size."""

    def __init__(self, cfg: ConnectorConfig):
        super().__init__()
        self.config = cfg
        self.layers = nn.ModuleList(ConnectorLayer(cfg) for _ in range(cfg.n_layers))
        self.fc1, self.fc2 = nn.Linear(cfg.dim, cfg.out), nn.Linear(cfg.out, cfg.out)
        self.norm = RMSNorm(cfg.out, OUT_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """The reader's last hidden states at the queries, [B, N, D] -> a condition [B, N, C]."""
        if x.ndim != 3 or x.shape[2] != self.config.dim:
            raise ValueError(f"got hidden states of shape {list(x.shape)}: expected [B, N, {self.config.dim}]")
        rows, n = x.shape[:2]
        mask = Mask([[Span(n, full=True)]] * rows, device=x.device)
        places = torch.arange(n, device=x.device).repeat(rows)
        angles = rope(places, self.config.head_dim, THETA, x.dtype)
        x = x.flatten(0, 1)
        for layer in self.layers:
            x = layer(x, angles, mask)
        x = self.norm(self.fc2(F.gelu(self.fc1(x), approximate="tanh")))
        return rearrange(x, "(B N) C -> B N C", B=rows)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None, *, scale: float = SANA_SCALE) -> None:
        """The weights that training begins with; scale: of the condition (1 for a UNet of Stable Diffusion)."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=INIT_STD, generator=generator)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else scale if name == "norm.weight" else 1.0)
