"""T5 v1.1's encoder: a caption to a state for each of its ids, as FLUX and UniWorld condition on it.

Raffel et al. 2020, arXiv 1910.10683, section 2.1, with the gated feed-forward of arXiv 2002.05202. Positions are a bias
of the scores alone, by how far apart two ids are. docs/originals/blocks.md, "T5 and CLIP".

Axes: B captions, L ids of a caption, D model, H heads, K head.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.component import PretrainedComponent
from unimm.checkpoint.config_io import JsonLayout, LayerCount, PositiveFloat, PositiveInt, read_config, write_config
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.keymap import Ignore, KeyMap, equal_slices, renames
from unimm.checkpoint.load import Shapes
from unimm.nn.layers import RMSNorm, SwiGLU

# how a released config names a feed-forward that is gated, and what the gate goes through
GATED_ACTIVATIONS = {"gated-gelu": "gelu_new", "gated-silu": "silu"}


@dataclass(frozen=True, kw_only=True)
class T5Config:
    dim: PositiveInt
    n_layers: LayerCount
    n_heads: PositiveInt
    head_dim: PositiveInt
    mlp_dim: PositiveInt
    vocab_size: PositiveInt
    n_buckets: PositiveInt  # of distances, half of them for each direction
    max_distance: PositiveInt  # from which on all are one bucket
    norm_eps: PositiveFloat
    feed_forward: str

    def __post_init__(self) -> None:
        sizes = (self.dim, self.n_layers, self.n_heads, self.head_dim, self.mlp_dim, self.vocab_size, self.norm_eps)
        if min(sizes) <= 0 or self.n_buckets % 2 or self.n_buckets < 4 or self.max_distance <= self.n_buckets // 4:
            raise ValueError(
                f"got {self}: expected positive numbers, an even number of buckets from 4 on, and a max_distance "
                "above a quarter of them; correct config.json"
            )
        if self.feed_forward not in GATED_ACTIVATIONS:
            raise ValueError(
                f"got feed_forward_proj {self.feed_forward!r}: expected {' or '.join(GATED_ACTIVATIONS)}, as in T5 "
                "v1.1; the first T5 is not supported"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "T5Config":
        """Read a released config.json. Raises ValueError for another model's, and for a T5 before v1.1."""
        config = read_config(cls, data, LAYOUT)
        implied = "gelu_new" if config.feed_forward == "gated-gelu" else config.feed_forward.removeprefix("gated-")
        act = data.get("dense_act_fn")
        if act not in (None, implied):
            raise ValueError(
                f"got dense_act_fn {act!r} beside feed_forward_proj {config.feed_forward!r}: expected {implied!r}"
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """The config.json that `from_json` reads, and that transformers does."""
        return write_config(self, LAYOUT)


LAYOUT = JsonLayout(
    name="the text encoder's config",
    source="FLUX's text_encoder_2/config.json",
    keys={
        "dim": "d_model",
        "n_layers": "num_layers",
        "n_heads": "num_heads",
        "head_dim": "d_kv",
        "mlp_dim": "d_ff",
        "vocab_size": "vocab_size",
        "n_buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "norm_eps": "layer_norm_epsilon",
        "feed_forward": "feed_forward_proj",
    },
    # those of T5Config in transformers
    defaults={
        "d_model": 512,
        "num_layers": 6,
        "num_heads": 8,
        "d_kv": 64,
        "d_ff": 2048,
        "vocab_size": 32128,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
    },
    fixed={"model_type": "t5"},
    constants={"architectures": ["T5EncoderModel"], "is_encoder_decoder": True},
)


def relative_position_buckets(length: int, n_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """The bucket [L, L] of the relative position of each pair (query, key).

    Half the buckets are for keys behind the query; of either half the first half holds one distance each, the rest grow
    with the logarithm up to `furthest`.
    """
    at = torch.arange(length, device=device)
    apart = at[None] - at[:, None]
    half = n_buckets // 2
    near = n_buckets // 4
    far = apart.abs().clamp(min=near).float()
    # in float32, and cut: a distance on the edge of a bucket falls where it fell in training
    far = near + (torch.log(far / near) / math.log(max_distance / near) * (half - near)).long()
    return torch.where(apart.abs() < near, apart.abs(), far.clamp(max=half - 1)) + half * (apart > 0)


class T5Block(nn.Module):
    """Pre-norm attention whose scores are not divided by the root of the width, then the gated feed-forward."""

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.n_heads * config.head_dim
        self.n_heads = config.n_heads
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.mlp_dim, GATED_ACTIVATIONS[config.feed_forward])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, D], bias of the scores [1, H, L, L] -> [B, L, D]."""
        q, k, v = rearrange(self.qkv(self.attn_norm(x)), "b n (three h k) -> three b h n k", three=3, h=self.n_heads)
        # not `kernels.attention`, which knows masks and no bias
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        x = x + self.out_proj(rearrange(y, "b h n k -> b n (h k)"))
        return x + self.mlp(self.mlp_norm(x))


class T5Encoder(PretrainedComponent):
    """Ids of captions to hidden states, with attention over the whole row, padding included."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.position_bias = nn.Embedding(config.n_buckets, config.n_heads)  # one for all layers
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    @classmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        return cls(T5Config.from_json(read_json(folder / "config.json", required=True)))

    def key_map(self, shapes: Shapes) -> KeyMap:
        return t5_key_map(shapes)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L], padded as in training (FLUX: to 512) -> states after the final norm [B, L, D]."""
        if ids.ndim != 2 or not ids.shape[1]:
            raise ValueError(f"got ids {list(ids.shape)}: expected [B, L], L > 0")
        config = self.config
        n = ids.shape[1]
        bias = rearrange(
            self.position_bias(relative_position_buckets(n, config.n_buckets, config.max_distance, ids.device)),
            "q k h -> 1 h q k",
        ).contiguous()
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


# the table of embeddings has two names, and older files hold it under both, or under the second alone
EMBED_KEYS = ("shared.weight", "encoder.embed_tokens.weight")


def t5_key_map(shapes: Collection[str] = ()) -> KeyMap:
    """The key map for files of these names; without any, the released ones."""
    embed, again = EMBED_KEYS[::-1] if EMBED_KEYS[1] in shapes and EMBED_KEYS[0] not in shapes else EMBED_KEYS
    block = "encoder.block.{}."
    attention = block + "layer.0.SelfAttention."
    mlp = block + "layer.1.DenseReluDense."
    names = {
        embed: "embed.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "position_bias.weight",
        attention + "o.weight": "blocks.{}.out_proj.weight",
        block + "layer.0.layer_norm.weight": "blocks.{}.attn_norm.weight",
        mlp + "wi_0.weight": "blocks.{}.mlp.gate.weight",
        mlp + "wi_1.weight": "blocks.{}.mlp.up.weight",
        mlp + "wo.weight": "blocks.{}.mlp.down.weight",
        block + "layer.1.layer_norm.weight": "blocks.{}.mlp_norm.weight",
        "encoder.final_layer_norm.weight": "norm.weight",
    }
    ignored = [
        Ignore(again, because="the table of embeddings once more, in older files"),
        *(
            Ignore(name, because="a part of the whole T5, beside the encoder")
            for name in ("decoder.{*}", "lm_head.weight")
        ),
    ]
    qkv = equal_slices([attention + f"{name}.weight" for name in "qkv"], "blocks.{}.qkv.weight")
    return renames(names) + qkv + KeyMap(*ignored)


KEY_MAP = t5_key_map()
