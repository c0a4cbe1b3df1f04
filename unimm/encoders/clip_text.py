"""CLIP's text encoder: a caption to states and to one pooled vector, as FLUX and UniWorld condition on it.

Radford et al. 2021, arXiv 2103.00020, section 2.4; docs/originals/blocks.md, "T5 and CLIP".

Axes: B captions, L ids of a caption, D model.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.component import PretrainedComponent
from unimm.checkpoint.config_io import JsonConfig, JsonLayout, LayerCount, PositiveFloat, PositiveInt
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import Shapes
from unimm.encoders.clip_keys import clip_key_map
from unimm.kernels import AttentionMask, KeyRange
from unimm.nn.layers import Activation, EncoderBlock

# the end that configs named before transformers corrected them; no id of the released vocabulary's end
LEGACY_EOS_ID = 2


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(JsonConfig):
    dim: PositiveInt
    n_layers: LayerCount
    n_heads: PositiveInt
    mlp_dim: PositiveInt
    vocab_size: PositiveInt
    max_positions: PositiveInt
    norm_eps: PositiveFloat
    act: Activation
    eos_id: int  # its first position is pooled; LEGACY_EOS_ID: the position of the largest id

    JSON: ClassVar = JsonLayout(
        name="the text encoder's config",
        source="FLUX's text_encoder/config.json",
        keys={
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "mlp_dim": "intermediate_size",
            "vocab_size": "vocab_size",
            "max_positions": "max_position_embeddings",
            "norm_eps": "layer_norm_eps",
            "act": "hidden_act",
            "eos_id": "eos_token_id",
        },
        # those of CLIPTextConfig in transformers
        defaults={
            "hidden_size": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
            "vocab_size": 49408,
            "max_position_embeddings": 77,
            "layer_norm_eps": 1e-5,
            "hidden_act": "quick_gelu",
            "eos_token_id": 49407,
        },
        fixed={"model_type": "clip_text_model"},
        constants={"architectures": ["CLIPTextModel"]},
        section="text_config",  # of a whole CLIP
    )

    def __post_init__(self) -> None:
        sizes = (
            self.dim,
            self.n_layers,
            self.n_heads,
            self.mlp_dim,
            self.vocab_size,
            self.max_positions,
            self.norm_eps,
        )
        if min(sizes) <= 0 or self.dim % self.n_heads:
            raise ValueError(
                f"got {self}: expected positive numbers, and a width that is a multiple of the heads; correct "
                "config.json"
            )


class CLIPTextEncoder(PretrainedComponent):
    """Ids of captions to hidden states, with causal attention."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.pos_embed = nn.Parameter(torch.zeros(config.max_positions, config.dim))
        self.blocks = nn.ModuleList(
            EncoderBlock(config.dim, config.n_heads, config.mlp_dim, config.act, config.norm_eps)
            for _ in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    @classmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        return cls(CLIPTextConfig.from_json(read_json(folder / "config.json", required=True)))

    def key_map(self, shapes: Shapes) -> KeyMap:
        return clip_text_key_map(shapes)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L], padding and all -> states after the final norm [B, L, D]."""
        if ids.ndim != 2 or not 0 < ids.shape[1] <= self.config.max_positions:
            raise ValueError(f"got ids {list(ids.shape)}: expected [B, L], L from 1 to {self.config.max_positions}")
        b, n = ids.shape
        mask = AttentionMask([[KeyRange(n)]] * b, device=ids.device)
        x = rearrange(self.embed(ids) + self.pos_embed[:n], "b n d -> (b n) d")
        for block in self.blocks:
            x = block(x, mask)
        return rearrange(self.norm(x), "(b n) d -> b n d", b=b)

    def pool(self, ids: Tensor, states: Tensor | None = None) -> Tensor:
        """One vector a caption [B, D]: the state where it ends. states: what `forward` gave for the ids, if at hand."""
        states = self(ids) if states is None else states
        ends = ids if self.config.eos_id == LEGACY_EOS_ID else (ids == self.config.eos_id).int()
        return states[torch.arange(len(ids), device=ids.device), ends.argmax(1)]


def clip_text_key_map(shapes: Collection[str] = ()) -> KeyMap:
    """The key map for files of these names (none: the released ones), which may hold the rest of a CLIP, too."""
    rows = {
        "embeddings.token_embedding.weight": "embed.weight",
        "embeddings.position_embedding.weight": "pos_embed",
        "final_layer_norm.{}": "norm.{}",
    }
    return clip_key_map("text", rows, shapes)


KEY_MAP = clip_text_key_map()  # of the released names
