"""SigLIP2's vision tower at one size: what UniWorld looks with, and LLaVA-OneVision.

Tschannen et al. 2025, arXiv 2502.14786; the fixed-size releases have SigLIP's own architecture (arXiv 2303.15343).
docs/originals/blocks.md, "SigLIP2".

Axes: B pictures, S pixels a side, n patches of a picture in raster order, D model.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.keymap import Table
from unimm.checkpoint.load import HUB_WEIGHTS, load_into, read_shapes, weight_files
from unimm.kernels import Block as Span
from unimm.kernels import Mask
from unimm.nn.layers import MLP, EncoderBlock
from unimm.processing.images.siglip import Stretch


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    dim: int
    n_layers: int
    n_heads: int
    mlp_dim: int
    patch: int
    size: int  # pixels a side; a rest that fills no patch is left out
    channels: int
    norm_eps: float
    act: str
    head: bool  # whether a picture's features can be pooled to one

    FILES: ClassVar[dict[str, str]] = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
        "patch": "patch_size",
        "size": "image_size",
        "channels": "num_channels",
        "norm_eps": "layer_norm_eps",
        "act": "hidden_act",
        "head": "vision_use_head",
    }
    # what SiglipVisionConfig says where a config is silent: the base model at 224 pixels
    SILENT: ClassVar[dict[str, Any]] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "patch_size": 16,
        "image_size": 224,
        "num_channels": 3,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": True,
    }

    def __post_init__(self) -> None:
        sizes = (self.dim, self.n_layers, self.n_heads, self.mlp_dim, self.patch, self.channels, self.norm_eps)
        if min(sizes) <= 0 or self.dim % self.n_heads or self.size < self.patch:
            raise ValueError(
                f"got {self}: expected positive numbers, a width that is a multiple of the heads, and pictures of a patch "
                "or more; correct config.json"
            )

    @classmethod
    def from_files(cls, files: Mapping[str, Any]) -> Self:
        """Read a released config.json, that of the tower or of a whole SigLIP. Raises ValueError for another model's."""
        vision = files.get("vision_config", files)
        kind = vision.get("model_type", "siglip_vision_model")
        if kind != "siglip_vision_model":
            raise ValueError(
                f"got model_type {kind!r}: expected 'siglip_vision_model', that of the fixed-size releases "
                "(google/siglip2-so400m-patch16-512 and its siblings; their naflex ones are not built)"
            )
        known = cls.SILENT | {key: value for key, value in vision.items() if value is not None}
        return cls(**{ours: known[theirs] for ours, theirs in cls.FILES.items()})

    def to_files(self) -> dict[str, Any]:
        """The config.json that `from_files` reads, and that transformers does."""
        files = {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        return files | {"model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"]}

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.size // self.patch


class Pool(nn.Module):
    """One query, learned, asks all features of a picture; a feed-forward behind it."""

    def __init__(self, cfg: SiglipConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.probe = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.qkv, self.out = nn.Linear(cfg.dim, 3 * cfg.dim), nn.Linear(cfg.dim, cfg.dim)
        self.norm = nn.LayerNorm(cfg.dim, cfg.norm_eps)
        self.mlp = MLP(cfg.dim, cfg.mlp_dim, cfg.dim, cfg.act)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, D] -> [B, D]."""
        d = x.shape[2]
        q = F.linear(repeat(self.probe, "1 1 d -> b 1 d", b=len(x)), self.qkv.weight[:d], self.qkv.bias[:d])
        k, v = F.linear(x, self.qkv.weight[d:], self.qkv.bias[d:]).chunk(2, -1)
        q, k, v = (rearrange(t, "b n (h k) -> b h n k", h=self.n_heads) for t in (q, k, v))
        # not `kernels.attention`: one query a picture, which no layout of blocks describes
        y = self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h 1 k -> b (h k)"))
        return y + self.mlp(self.norm(y))


class Siglip(nn.Module):
    """Pictures of one size to a feature for each patch. `pixels` is the rule that makes its pictures."""

    def __init__(self, cfg: SiglipConfig, pixels: Stretch | None = None):
        super().__init__()
        self.cfg = cfg
        self.pixels = pixels or Stretch(size=cfg.size)
        self.patch = nn.Conv2d(cfg.channels, cfg.dim, cfg.patch, cfg.patch)
        self.positions = nn.Parameter(torch.zeros(cfg.side**2, cfg.dim))
        self.blocks = nn.ModuleList(
            EncoderBlock(cfg.dim, cfg.n_heads, cfg.mlp_dim, cfg.act, cfg.norm_eps) for _ in range(cfg.n_layers)
        )
        self.norm = nn.LayerNorm(cfg.dim, cfg.norm_eps)
        self.pool = Pool(cfg) if cfg.head else None

    def embed(self, images: Tensor) -> Tensor:
        """images [B, C, S, S], normalised -> patches with their positions [B, n, D]."""
        found, expected = list(images.shape), [self.cfg.channels, self.cfg.size, self.cfg.size]
        if len(found) != 4 or found[1:] != expected:
            raise ValueError(f"got pictures {found}: expected [B, {str(expected)[1:]}, as `pixels` makes them")
        return rearrange(self.patch(images), "b d h w -> b (h w) d") + self.positions

    def layers(self, images: Tensor) -> Tensor:
        """images [B, C, S, S] -> features of the last layer [B, n, D], before the final norm."""
        x = self.embed(images)
        b, n, _ = x.shape
        mask = Mask([[Span(n, full=True)]] * b, device=x.device)
        x = rearrange(x, "b n d -> (b n) d")
        for block in self.blocks:
            x = block(x, mask)
        return rearrange(x, "(b n) d -> b n d", b=b)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, S, S], normalised -> features after the final norm [B, n, D]."""
        return self.norm(self.layers(images))

    def pooled(self, features: Tensor) -> Tensor:
        """What `forward` gave [B, n, D] -> one feature a picture [B, D]. Raises ValueError where no head was loaded."""
        if self.pool is None:
            raise ValueError("this tower has no pooling head (vision_use_head false): read its features")
        return self.pool(features)


def tower_keys(theirs: str, ours: str, *, head: bool) -> Table:
    """Rows of a key table for a tower; released names begin with `theirs`, ours with `ours`."""
    block, part, pool = theirs + "encoder.layers.{}.", ours + "blocks.{}.", theirs + "head."
    heads: Table = {
        pool + "probe": ours + "pool.probe",
        pool + "attention.in_proj_{}": ours + "pool.qkv.{}",
        pool + "attention.out_proj.{}": ours + "pool.out.{}",
        pool + "layernorm.{}": ours + "pool.norm.{}",
        pool + "mlp.{}.{}": ours + "pool.mlp.{}.{}",
    }
    return {
        theirs + "embeddings.patch_embedding.{}": ours + "patch.{}",
        theirs + "embeddings.position_embedding.weight": ours + "positions",
        theirs + "embeddings.position_ids": None,  # a buffer that older files hold
        block + "layer_norm1.{}": part + "attn_norm.{}",
        block + "layer_norm2.{}": part + "mlp_norm.{}",
        **{block + f"self_attn.{p}_proj.{{}}": part + f"{p}.{{}}" for p in "qkv"},
        block + "self_attn.out_proj.{}": part + "o.{}",
        block + "mlp.{}.{}": part + "mlp.{}.{}",
        theirs + "post_layernorm.{}": ours + "norm.{}",
        **(heads if head else {pool + "{*}": None}),
    }


def keys(cfg: SiglipConfig, shapes: Collection[str] = ()) -> Table:
    """The table of files of these names (none: the released ones), which may hold the tower of texts beside this one."""
    unread = {"text_model.{*}": None, "logit_scale": None, "logit_bias": None}
    # what transformers writes of a tower alone today has no name around it
    theirs = "" if any(key.startswith("embeddings.") for key in shapes) else "vision_model."
    return {**tower_keys(theirs, "", head=cfg.head), **unread}


def load_siglip(folder: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Siglip:
    """The vision tower of a released folder, strictly, in evaluation mode; a tower of texts beside it is left unread.

    Raises ValueError for another model's config, CheckpointError for weights that do not fit it.
    """
    cfg = SiglipConfig.from_files(json.loads((folder / "config.json").read_text()))
    rule = folder / "preprocessor_config.json"
    pixels = Stretch.from_files(json.loads(rule.read_text()) if rule.exists() else {}, size=cfg.size)
    with torch.device("meta"):
        model = Siglip(cfg, pixels)
    paths = weight_files(folder, HUB_WEIGHTS)
    load_into(model, paths, keys(cfg, read_shapes(paths)), dtype=dtype, device=torch.device(device))
    return model.eval()
