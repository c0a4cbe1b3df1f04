"""Sana: a diffusion transformer whose self-attention is linear in the number of latents, told what to draw by a caption.

Xie et al. 2024, arXiv 2410.10629, section 2.3; docs/originals/blocks.md, "Sana transformer": no positions;
cross-attention without a norm before and a gate after. Time 0 is data, 1 is noise; velocity = noise - data.

Axes: B batch, L tokens of the latents, M tokens of the caption, D model, H heads, K head, C channels, h w grid, p patch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.keymap import Table
from unimm.checkpoint.load import load_into, weight_files
from unimm.kernels import modulate
from unimm.nn.layers import MLP, RMSNorm
from unimm.nn.timestep import TimeMLP, time_features
from unimm.tokenizers.dc_ae import MixFFN, linear_attention
from unimm.tokenizers.kl_layouts import DIFFUSERS_WEIGHTS

TIMESTEPS = 1000  # the released model counts its times from 0 to this
TIME_FEATURES = 256  # cosines and sines of a time
OUT_EPS, CAPTION_EPS = 1e-6, 1e-5  # of the last norm and of the caption's, in no config
SHIFTS = 6  # shift, scale and gate of the attention, then of the feed-forward

KEYS: Table = {
    "patch_embed.proj.{}": "patch.{}",
    "time_embed.emb.timestep_embedder.{}.{}": "time.{}.{}",
    "time_embed.linear.{}": "modulation.{}",
    "caption_projection.linear_1.{}": "caption.fc1.{}",
    "caption_projection.linear_2.{}": "caption.fc2.{}",
    "caption_norm.weight": "caption_norm.weight",
    "transformer_blocks.{}.scale_shift_table": "blocks.{}.table",
    "transformer_blocks.{}.attn1.to_q.{}": "blocks.{}.attention.qkv.{}[0/3]",
    "transformer_blocks.{}.attn1.to_k.{}": "blocks.{}.attention.qkv.{}[1/3]",
    "transformer_blocks.{}.attn1.to_v.{}": "blocks.{}.attention.qkv.{}[2/3]",
    "transformer_blocks.{}.attn1.to_out.0.{}": "blocks.{}.attention.out.{}",
    "transformer_blocks.{}.attn2.to_q.{}": "blocks.{}.cross.q.{}",
    "transformer_blocks.{}.attn2.to_k.{}": "blocks.{}.cross.kv.{}[0/2]",
    "transformer_blocks.{}.attn2.to_v.{}": "blocks.{}.cross.kv.{}[1/2]",
    "transformer_blocks.{}.attn2.to_out.0.{}": "blocks.{}.cross.out.{}",
    "transformer_blocks.{}.ff.{}.{}": "blocks.{}.mlp.{}.{}",
    "scale_shift_table": "table",
    "proj_out.{}": "out.{}",
}


@dataclass(frozen=True, kw_only=True)
class SanaConfig:
    in_channels: int
    out_channels: int
    side: int  # of the grid of latents that it was trained on; it draws others, too
    patch: int
    n_layers: int
    n_heads: int
    head_dim: int
    n_cross_heads: int
    cross_head_dim: int
    caption_dim: int
    mlp_ratio: float
    qkv_bias: bool
    norm_eps: float

    FILES: ClassVar = {
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "side": "sample_size",
        "patch": "patch_size",
        "n_layers": "num_layers",
        "n_heads": "num_attention_heads",
        "head_dim": "attention_head_dim",
        "n_cross_heads": "num_cross_attention_heads",
        "cross_head_dim": "cross_attention_head_dim",
        "caption_dim": "caption_channels",
        "mlp_ratio": "mlp_ratio",
        "qkv_bias": "attention_bias",
        "norm_eps": "norm_eps",
    }
    # what a config could say and the released ones do not
    FIXED: ClassVar = {
        "_class_name": "SanaTransformer2DModel",
        "dropout": 0.0,
        "interpolation_scale": None,  # a number asks for a table of positions
        "norm_elementwise_affine": False,
        "guidance_embeds": False,
        "qk_norm": None,
        "timestep_scale": 1.0,
    }

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in self.FILES if name != "qkv_bias"}
        if wrong := [f"{name} {number}" for name, number in numbers.items() if not number > 0]:
            raise ValueError(f"got {', '.join(wrong)} in a Sana config: expected positive numbers")

    @property
    def dim(self) -> int:
        """The width of the stream."""
        return self.n_heads * self.head_dim

    @classmethod
    def from_files(cls, files: Mapping[str, Any]) -> Self:
        """Read a released config.json. Raises ValueError for what is missing, or what no release of Sana 1.6B has."""
        for key, expected in cls.FIXED.items():
            if files.get(key, expected) != expected:
                raise ValueError(f"got {key} {files[key]!r}, expected {expected!r}, as in the releases of Sana 1.6B")
        files = {"attention_bias": False, "norm_eps": 1e-6, "patch_size": 1, **files}
        files = files | {"out_channels": files.get("out_channels") or files.get("in_channels")}
        if lost := [name for name in cls.FILES.values() if files.get(name) is None]:
            raise ValueError(
                f"the config lacks {', '.join(lost)}: expected the released config.json of a Sana transformer"
            )
        config = cls(**{ours: files[theirs] for ours, theirs in cls.FILES.items()})
        if files.get("cross_attention_dim", config.dim) != config.dim:
            raise ValueError(
                f"got cross_attention_dim {files['cross_attention_dim']}, expected {config.dim}: a caption comes with the "
                "width of num_attention_heads * attention_head_dim"
            )
        return config

    def to_files(self) -> dict[str, Any]:
        """The config.json that `from_files` reads, and that diffusers does."""
        files = {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        return self.FIXED | files | {"cross_attention_dim": self.dim}


class Condition(NamedTuple):
    """A caption as the blocks see it: computed once a picture, and the same at every step.

    tokens [B, M, D], projected; keys and values of every block, [B, H, M, K]; seen [B, 1, 1, M], or None where all are.
    """

    tokens: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    seen: Tensor | None

    def rows(self, index: Tensor) -> "Condition":
        """The condition of rows `index` [N]: several pictures of one caption, or a branch of guidance."""
        keys, values = (tuple(x[index] for x in part) for part in (self.keys, self.values))
        return Condition(self.tokens[index], keys, values, None if self.seen is None else self.seen[index])


class LinearAttention(nn.Module):
    """Every latent attends to every other by the products of rectified queries and keys."""

    def __init__(self, cfg: SanaConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim, bias=cfg.qkv_bias)
        self.out = nn.Linear(cfg.dim, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]"""
        q, k, v = rearrange(self.qkv(x), "B L (three H K) -> three B H L K", three=3, K=self.head_dim)
        return self.out(rearrange(linear_attention(q, k, v), "B H L K -> B L (H K)").to(x.dtype))


class CrossAttention(nn.Module):
    """Latents ask, the caption answers."""

    def __init__(self, cfg: SanaConfig):
        super().__init__()
        inner = cfg.n_cross_heads * cfg.cross_head_dim
        self.head_dim = cfg.cross_head_dim
        self.q, self.kv = nn.Linear(cfg.dim, inner), nn.Linear(cfg.dim, 2 * inner)
        self.out = nn.Linear(inner, cfg.dim)

    def see(self, caption: Tensor) -> tuple[Tensor, Tensor]:
        """caption [B, M, D] -> keys and values, [B, H, M, K] each."""
        k, v = rearrange(self.kv(caption), "B M (two H K) -> two B H M K", two=2, K=self.head_dim)
        return k.contiguous(), v.contiguous()

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
        """x [B, L, D], what `see` gave -> [B, L, D]"""
        q = rearrange(self.q(x), "B L (H K) -> B H L K", K=self.head_dim)
        if q.device.type == "cpu":
            # its backward is nine times as slow in bfloat16 (128 pictures of 16 tokens, 20 keys: 84 ms against 9)
            q, keys, values = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (q, keys, values))
        # not `kernels.attention`: keys of their own, the same for all rows of a picture, need no mask of ranges
        with torch.autocast(q.device.type, enabled=q.device.type != "cpu" and torch.is_autocast_enabled(q.device.type)):
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        return self.out(rearrange(y, "B H L K -> B L (H K)").to(x.dtype))


class SanaBlock(nn.Module):
    """Linear attention, cross attention, and a feed-forward that looks at the neighbours; the time turns the first and last."""

    def __init__(self, cfg: SanaConfig):
        super().__init__()
        self.eps = cfg.norm_eps
        self.table = nn.Parameter(torch.zeros(SHIFTS, cfg.dim))
        self.attention = LinearAttention(cfg)
        self.cross = CrossAttention(cfg)
        self.mlp = MixFFN(cfg.dim, int(cfg.mlp_ratio * cfg.dim))

    def forward(
        self, x: Tensor, time: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, *, height: int
    ) -> Tensor:
        """x [B, L, D], time [B, 6, D], the caption's keys and values [B, H, M, K] -> [B, L, D]"""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.table + time).unbind(1)
        x = x + gate[:, None] * self.attention(modulate(x, scale, shift, self.eps))
        # the caption's part has neither norm nor gate
        x = x + self.cross(x, keys, values, seen)
        y = rearrange(modulate(x, mlp_scale, mlp_shift, self.eps), "B (h w) D -> B h w D", h=height)
        return x + mlp_gate[:, None] * self.mlp(y).flatten(1, 2)


class Sana(nn.Module):
    """Noised latents, their times and a condition to the velocity."""

    def __init__(self, cfg: SanaConfig):
        super().__init__()
        self.config = cfg
        self.patch = nn.Conv2d(cfg.in_channels, cfg.dim, cfg.patch, cfg.patch)
        self.time = TimeMLP(TIME_FEATURES, cfg.dim, bias=True)
        self.modulation = nn.Linear(cfg.dim, SHIFTS * cfg.dim)
        self.caption = MLP(cfg.caption_dim, cfg.dim, cfg.dim, "gelu_pytorch_tanh")
        self.caption_norm = RMSNorm(cfg.dim, CAPTION_EPS)
        self.blocks = nn.ModuleList(SanaBlock(cfg) for _ in range(cfg.n_layers))
        self.table = nn.Parameter(torch.zeros(2, cfg.dim))
        self.out = nn.Linear(cfg.dim, cfg.patch**2 * cfg.out_channels)

    def condition(self, caption: Tensor, seen: Tensor | None = None) -> Condition:
        """caption [B, M, C], seen [B, M] (0 where a token is padding; all are seen unless given) -> what `forward` takes.

        Raises ValueError for other shapes, and where a row sees nothing.
        """
        if caption.ndim != 3 or caption.shape[2] != self.config.caption_dim or not caption.shape[1]:
            raise ValueError(
                f"got a caption of shape {list(caption.shape)}: expected [B, M, {self.config.caption_dim}], M > 0"
            )
        if seen is not None and (seen.shape != caption.shape[:2] or not seen.bool().any(1).all()):
            raise ValueError(
                f"got seen {list(seen.shape)} for a caption {list(caption.shape)}: expected {list(caption.shape[:2])} "
                "with a token to see in every row"
            )
        tokens = self.caption_norm(self.caption(caption))
        blocks = cast("list[SanaBlock]", self.blocks)  # of a ModuleList nothing is known but that it holds modules
        keys, values = zip(*(block.cross.see(tokens) for block in blocks), strict=True)
        return Condition(tokens, keys, values, None if seen is None else seen.bool()[:, None, None])

    def forward(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """latents [B, C, h, w], times [B] float32 in [0, 1], a condition of as many rows -> velocity [B, C, h, w]."""
        p, channels, found = self.config.patch, self.config.in_channels, list(latents.shape)
        if len(found) != 4 or found[1] != channels or found[2] % p or found[3] % p:
            raise ValueError(
                f"got latents {found}: expected [B, {channels}, h, w] with sides that are multiples of {p}"
            )
        if not found[0] == len(times) == len(condition.tokens):
            raise ValueError(
                f"got {found[0]} latents, {len(times)} times, a condition of {len(condition.tokens)} rows: expected as many; "
                "condition.rows(index) repeats and picks rows"
            )
        x = rearrange(self.patch(latents), "B D h w -> B (h w) D")
        time, shifts = self.embed(times)
        for block, keys, values in zip(self.blocks, condition.keys, condition.values, strict=True):
            x = block(x, shifts, keys, values, condition.seen, height=found[2] // p)
        shift, scale = (self.table + time[:, None]).unbind(1)
        x = self.out(modulate(x, scale, shift, OUT_EPS))
        return rearrange(x, "B (h w) (py px C) -> B C (h py) (w px)", h=found[2] // p, py=p, px=p)

    def embed(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """times [B] in [0, 1] -> embedded [B, D], and what all blocks share of their shifts, scales and gates, [B, 6, D]."""
        time = self.time(time_features(TIMESTEPS * times.float(), TIME_FEATURES).to(self.table.dtype))
        return time, rearrange(self.modulation(F.silu(time)), "B (six D) -> B six D", six=SHIFTS)


def load_sana(folder: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Sana:
    """A transformer from a released folder (config.json beside the weights), strictly, in evaluation mode.

    Raises ValueError for another class's config, CheckpointError for weights that do not fit it.
    """
    with torch.device("meta"):
        model = Sana(SanaConfig.from_files(json.loads((folder / "config.json").read_text())))
    load_into(model, weight_files(folder, DIFFUSERS_WEIGHTS), KEYS, dtype=dtype, device=torch.device(device))
    return model.eval()
