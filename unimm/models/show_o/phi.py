"""Phi's causal decoder with norms of queries and keys, as Show-o has it: parallel blocks, partial rotary positions.

A block computes attention and feed-forward from one LayerNorm of its input. Queries and keys are normalised per head,
then a share of each head's dimensions is rotated. All linears, the language head too, have biases. Phi-1.5: arXiv
2309.05463; docs/originals/show_o.md, "Language model".

Axes: N packed tokens, D model, H heads, K head, R rotated dimensions of a head, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from unimm.checkpoint.config_io import (
    JsonLayout,
    LayerCount,
    PositiveFloat,
    PositiveInt,
    SameAs,
    read_config,
    write_config,
)
from unimm.nn.decoder import AttentionFn, CausalDecoder, RowsByExpert
from unimm.nn.layers import MLP, Activation
from unimm.nn.rope import apply_rope, rope_cos_sin
from unimm.vlms.llama_layout import EXPERT


@dataclass(frozen=True, kw_only=True)
class PhiConfig:
    """Numbers of the decoder; the defaults are Phi-1.5's. vocab_size: of Show-o's table, which is longer than Phi's."""

    dim: PositiveInt = 2048
    n_layers: LayerCount = 24
    n_heads: PositiveInt = 32
    n_kv_heads: PositiveInt = 32
    mlp_dim: PositiveInt = 8192
    max_positions: PositiveInt = 2048
    rope_theta: PositiveFloat = 10000.0
    rotary_share: Annotated[float, "positive"] = 0.5  # of a head's dimensions
    norm_eps: PositiveFloat = 1e-5
    act: Activation = "gelu_new"
    vocab_size: PositiveInt

    # qk_layernorm is not read: Phi-1.5's file says false, and Show-o's code has the norms whatever it says
    JSON: ClassVar = JsonLayout(
        name="Phi's config.json",
        source="microsoft/phi-1_5",
        keys={
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "mlp_dim": "intermediate_size",
            "max_positions": "max_position_embeddings",
            "rope_theta": "rope_theta",
            "rotary_share": "partial_rotary_factor",
            "norm_eps": "layer_norm_eps",
            "act": "hidden_act",
        },
        defaults={"num_key_value_heads": SameAs("num_attention_heads")},
        fixed={
            "model_type": "phi",
            "tie_word_embeddings": False,
            "rope_scaling": None,
            "attention_dropout": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        constants={"architectures": ["PhiForCausalLM"], "qk_layernorm": False},
    )

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.n_kv_heads != self.n_heads:
            raise ValueError(
                f"got {self.n_heads} heads and {self.n_kv_heads} of keys and values for a width of {self.dim} in Phi's "
                "config: expected as many of both, and a multiple of them; correct config.json"
            )
        if not 2 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"got partial_rotary_factor {self.rotary_share} of heads of {self.head_dim}: expected an even number of "
                "rotated dimensions; correct config.json"
            )

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.dim // self.n_heads

    @property
    def rotary_dim(self) -> int:
        """The rotated dimensions of a head, its first ones."""
        return int(self.rotary_share * self.head_dim)

    @property
    def experts(self) -> tuple[str, ...]:
        """The one set of weights for all rows."""
        return (EXPERT,)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, vocab_size: int) -> "PhiConfig":
        """Read a Phi's config.json, Phi-1.5's numbers for what is missing. Raises ValueError for what is not built."""
        return read_config(cls, data, cls.JSON, given={"vocab_size": vocab_size})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        return write_config(self, self.JSON)


class PhiBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), with one norm."""

    def __init__(self, config: PhiConfig, layer: int):
        super().__init__()
        dim = config.dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.rotary_dim = config.rotary_dim
        self.norm = nn.LayerNorm(dim, config.norm_eps)
        self.q, self.k, self.v, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm = nn.LayerNorm(config.head_dim, config.norm_eps)
        self.k_norm = nn.LayerNorm(config.head_dim, config.norm_eps)
        self.mlp = MLP(dim, config.mlp_dim, dim, config.act)

    def project_qkv(self, h: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised rows h [N, D], cos_sin [2, N, R/2] -> q, k, v [N, H, K]; q and k normalised, then rotated."""
        q, k, v = (rearrange(linear(h), "n (h k) -> n h k", k=self.head_dim) for linear in (self.q, self.k, self.v))
        q = self._rotate(self.q_norm(q), cos_sin)
        k = self._rotate(self.k_norm(k), cos_sin)
        # under autocast norms and cos_sin are float32
        return q.to(v.dtype), k.to(v.dtype), v

    def _rotate(self, x: Tensor, cos_sin: Tensor) -> Tensor:
        rotated, kept = x.split([self.rotary_dim, self.head_dim - self.rotary_dim], -1)
        return torch.cat((apply_rope(rotated, cos_sin), kept), -1)

    def forward(self, x: Tensor, cos_sin: Tensor, attend: AttentionFn) -> Tensor:
        """x [N, D] -> [N, D]."""
        h = self.norm(x)
        y = attend(self.layer, *self.project_qkv(h, cos_sin))
        return x + self.out_proj(rearrange(y, "n h k -> n (h k)")) + self.mlp(h)


class PhiDecoder(CausalDecoder):
    """Token embedding, parallel blocks, a final norm, and a language head with a bias."""

    config: PhiConfig

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.config = config
        self.n_cached_heads = config.n_kv_heads
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(PhiBlock(config, layer) for layer in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size)

    def forward(self, x: Tensor, position_ids: Tensor, rows: RowsByExpert, attend: AttentionFn) -> RowsByExpert:
        """x [N, D], position_ids [N] -> {EXPERT: [N, D]}, before the final norm; `rows` are all of them."""
        cos_sin = rope_cos_sin(position_ids, self.config.rotary_dim, self.config.rope_theta, x.dtype)
        for block in self.blocks:
            x = block(x, cos_sin, attend)
        return {EXPERT: x}

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [n, D] -> [n, V]."""
        return self.head(self.norm(x))

    def logits_between(self, x: Tensor, first: int, last: int) -> Tensor:
        """Hidden states [n, D] -> the logits of the ids from `first` to `last`, exclusive: no others are computed."""
        return nn.functional.linear(self.norm(x), self.head.weight[first:last], self.head.bias[first:last])
