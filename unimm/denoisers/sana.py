"""Sana: a diffusion transformer whose self-attention is linear in the number of latents, conditioned on a caption.

Xie et al. 2024, arXiv 2410.10629, section 2.3; docs/originals/blocks.md, "Sana transformer": no positions;
cross-attention without a norm before and a gate after. Time 0 is data, 1 is noise; velocity = noise - data.

Axes: B batch, L tokens of the latents, M tokens of the caption, D model, H heads, K head, C channels, h w grid, p
patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.component import DIFFUSERS_WEIGHT_FILES, PretrainedComponent
from unimm.checkpoint.config_io import JsonConfig, JsonLayout, LayerCount, PositiveFloat, PositiveInt, SameAs
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.keymap import KeyMap, equal_slices, renames
from unimm.checkpoint.load import Shapes
from unimm.generation.step_cache import RowStepCache
from unimm.kernels import adaln_modulate
from unimm.kernels.dispatch import device_type
from unimm.nn.layers import MLP, RMSNorm
from unimm.nn.linear_attention import MixFFN, linear_attention
from unimm.nn.timestep import TimestepMLP, timestep_embedding

TIMESTEP_SCALE = 1000  # the released model counts its times from 0 to this
TIMESTEP_EMBED_DIM = 256  # cosines and sines of a time
FINAL_NORM_EPS = 1e-6  # in no config, as the next
CAPTION_NORM_EPS = 1e-5
N_MODULATIONS = 6  # shift, scale and gate of the attention, then of the feed-forward

KEY_MAP = renames(
    {
        "patch_embed.proj.{}": "patch_embed.{}",
        "time_embed.emb.timestep_embedder.{}.{}": "time_embed.{}.{}",
        "time_embed.linear.{}": "modulation.{}",
        "caption_projection.linear_1.{}": "caption_proj.fc1.{}",
        "caption_projection.linear_2.{}": "caption_proj.fc2.{}",
        "caption_norm.weight": "caption_norm.weight",
        "transformer_blocks.{}.scale_shift_table": "blocks.{}.scale_shift_table",
        "transformer_blocks.{}.attn1.to_out.0.{}": "blocks.{}.attention.out_proj.{}",
        "transformer_blocks.{}.attn2.to_q.{}": "blocks.{}.cross_attention.q.{}",
        "transformer_blocks.{}.attn2.to_out.0.{}": "blocks.{}.cross_attention.out_proj.{}",
        "transformer_blocks.{}.ff.{}.{}": "blocks.{}.mlp.{}.{}",
        "scale_shift_table": "scale_shift_table",
        "proj_out.{}": "out_proj.{}",
    }
)
KEY_MAP += equal_slices(
    [f"transformer_blocks.{{}}.attn1.to_{name}.{{}}" for name in "qkv"], "blocks.{}.attention.qkv.{}"
)
KEY_MAP += equal_slices(
    [f"transformer_blocks.{{}}.attn2.to_{name}.{{}}" for name in "kv"], "blocks.{}.cross_attention.kv.{}"
)


@dataclass(frozen=True, kw_only=True)
class SanaConfig(JsonConfig):
    in_channels: PositiveInt
    out_channels: PositiveInt
    sample_size: PositiveInt  # side of the grid of latents that it was trained on; others are possible
    patch_size: PositiveInt
    n_layers: LayerCount
    n_heads: PositiveInt
    head_dim: PositiveInt
    n_cross_heads: PositiveInt
    cross_head_dim: PositiveInt
    caption_dim: PositiveInt
    mlp_ratio: PositiveFloat
    qkv_bias: bool
    norm_eps: PositiveFloat

    JSON: ClassVar = JsonLayout(
        source="the released config.json of a Sana 1.6B transformer",
        keys={
            "in_channels": "in_channels",
            "out_channels": "out_channels",
            "sample_size": "sample_size",
            "patch_size": "patch_size",
            "n_layers": "num_layers",
            "n_heads": "num_attention_heads",
            "head_dim": "attention_head_dim",
            "n_cross_heads": "num_cross_attention_heads",
            "cross_head_dim": "cross_attention_head_dim",
            "caption_dim": "caption_channels",
            "mlp_ratio": "mlp_ratio",
            "qkv_bias": "attention_bias",
            "norm_eps": "norm_eps",
        },
        defaults={"out_channels": SameAs("in_channels"), "patch_size": 1, "attention_bias": False, "norm_eps": 1e-6},
        fixed={
            "_class_name": "SanaTransformer2DModel",
            "dropout": 0.0,
            "interpolation_scale": None,  # a number would mean a table of positions
            "norm_elementwise_affine": False,
            "guidance_embeds": False,
            "qk_norm": None,
            "timestep_scale": 1.0,
        },
        derived={"cross_attention_dim": "dim"},  # a caption is projected to the width of the stream
    )

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if name != "qkv_bias"}
        if wrong := [f"{name} {number}" for name, number in numbers.items() if not number > 0]:
            raise ValueError(f"got {', '.join(wrong)} in a Sana config: expected positive numbers")

    @property
    def dim(self) -> int:
        """The width of the stream."""
        return self.n_heads * self.head_dim


class SanaCondition(NamedTuple):
    """The projected caption that the blocks attend to: computed once an image, the same at every step.

    tokens [B, M, D], projected; keys and values of every block, [B, H, M, K]; attention_mask [B, 1, 1, M], None where
    nothing is masked.
    """

    tokens: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    attention_mask: Tensor | None

    def select_rows(self, index: Tensor) -> "SanaCondition":
        """The condition of rows `index` [N]: several images of one caption, or a branch of guidance."""
        keys, values = (tuple(x[index] for x in part) for part in (self.keys, self.values))
        return SanaCondition(
            self.tokens[index], keys, values, None if self.attention_mask is None else self.attention_mask[index]
        )

    @staticmethod
    def cat(conditions: "Sequence[SanaCondition]") -> "SanaCondition":
        """The rows of several conditions without masks, one after the other."""
        assert all(one.attention_mask is None for one in conditions), "captions of other lengths are not joined"
        keys, values = (
            tuple(torch.cat(layer) for layer in zip(*parts, strict=True))
            for parts in ([one.keys for one in conditions], [one.values for one in conditions])
        )
        return SanaCondition(torch.cat([one.tokens for one in conditions]), keys, values, None)


class SanaLinearAttention(nn.Module):
    """Every latent attends to every other by the products of rectified queries and keys."""

    def __init__(self, config: SanaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]"""
        q, k, v = rearrange(self.qkv(x), "B L (three H K) -> three B H L K", three=3, K=self.head_dim)
        return self.out_proj(rearrange(linear_attention(q, k, v), "B H L K -> B L (H K)").to(x.dtype))


class SanaCrossAttention(nn.Module):
    """Attention from the latents to the caption."""

    def __init__(self, config: SanaConfig):
        super().__init__()
        inner = config.n_cross_heads * config.cross_head_dim
        self.head_dim = config.cross_head_dim
        self.q = nn.Linear(config.dim, inner)
        self.kv = nn.Linear(config.dim, 2 * inner)
        self.out_proj = nn.Linear(inner, config.dim)

    def project_kv(self, caption: Tensor) -> tuple[Tensor, Tensor]:
        """caption [B, M, D] -> keys and values, [B, H, M, K] each."""
        k, v = rearrange(self.kv(caption), "B M (two H K) -> two B H M K", two=2, K=self.head_dim)
        return k.contiguous(), v.contiguous()

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None) -> Tensor:
        """x [B, L, D], keys and values of `project_kv` -> [B, L, D]"""
        q = rearrange(self.q(x), "B L (H K) -> B H L K", K=self.head_dim)
        on_cpu = device_type(q) == "cpu"
        if on_cpu:
            # its backward is nine times as slow in bfloat16 (128 images of 16 tokens, 20 keys: 84 ms against 9)
            q, keys, values = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (q, keys, values))
        # not `kernels.attention`: keys of their own, the same for all rows of an image, need no mask of ranges
        with torch.autocast(q.device.type, enabled=not on_cpu and torch.is_autocast_enabled(q.device.type)):
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=attention_mask)
        return self.out_proj(rearrange(y, "B H L K -> B L (H K)").to(x.dtype))


class SanaBlock(nn.Module):
    """Linear attention, cross attention, and a convolutional feed-forward; the timestep modulates the first and the
    last."""

    def __init__(self, config: SanaConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.zeros(N_MODULATIONS, config.dim))
        self.attention = SanaLinearAttention(config)
        self.cross_attention = SanaCrossAttention(config)
        self.mlp = MixFFN(config.dim, int(config.mlp_ratio * config.dim))

    def forward(
        self, x: Tensor, time: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None, *, height: int
    ) -> Tensor:
        """x [B, L, D], time [B, 6, D], the caption's keys and values [B, H, M, K] -> [B, L, D]"""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.scale_shift_table + time).unbind(1)
        x = x + gate[:, None] * self.attention(adaln_modulate(x, scale, shift, self.eps))
        # the caption's part has neither norm nor gate
        x = x + self.cross_attention(x, keys, values, attention_mask)
        y = rearrange(adaln_modulate(x, mlp_scale, mlp_shift, self.eps), "B (h w) D -> B h w D", h=height)
        return x + mlp_gate[:, None] * self.mlp(y).flatten(1, 2)


class SanaTransformer(PretrainedComponent):
    """Noised latents, their times and a condition to the velocity."""

    WEIGHT_FILES = DIFFUSERS_WEIGHT_FILES

    def __init__(self, config: SanaConfig):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(config.in_channels, config.dim, config.patch_size, config.patch_size)
        self.time_embed = TimestepMLP(TIMESTEP_EMBED_DIM, config.dim, bias=True)
        self.modulation = nn.Linear(config.dim, N_MODULATIONS * config.dim)
        self.caption_proj = MLP(config.caption_dim, config.dim, config.dim, "gelu_pytorch_tanh")
        self.caption_norm = RMSNorm(config.dim, CAPTION_NORM_EPS)
        self.blocks = nn.ModuleList(SanaBlock(config) for _ in range(config.n_layers))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, config.dim))
        self.out_proj = nn.Linear(config.dim, config.patch_size**2 * config.out_channels)

    @classmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        return cls(SanaConfig.from_json(read_json(folder / "config.json", required=True)))

    def key_map(self, shapes: Shapes) -> KeyMap:
        return KEY_MAP

    def condition(self, caption: Tensor, key_padding_mask: Tensor | None = None) -> SanaCondition:
        """caption [B, M, C], key_padding_mask [B, M] (0 where a token is padding; none is by default) -> what `forward`
        takes.

        Raises ValueError for other shapes, and for a row of padding alone.
        """
        if caption.ndim != 3 or caption.shape[2] != self.config.caption_dim or not caption.shape[1]:
            raise ValueError(
                f"got a caption of shape {list(caption.shape)}: expected [B, M, {self.config.caption_dim}], M > 0"
            )
        if key_padding_mask is not None and (
            key_padding_mask.shape != caption.shape[:2] or not key_padding_mask.bool().any(1).all()
        ):
            raise ValueError(
                f"got key_padding_mask {list(key_padding_mask.shape)} for a caption {list(caption.shape)}: expected "
                f"{list(caption.shape[:2])}, with a token that is no padding in every row"
            )
        tokens = self.caption_norm(self.caption_proj(caption))
        blocks = cast("list[SanaBlock]", self.blocks)  # of a ModuleList nothing is known but that it holds modules
        keys, values = zip(*(block.cross_attention.project_kv(tokens) for block in blocks), strict=True)
        return SanaCondition(
            tokens, keys, values, None if key_padding_mask is None else key_padding_mask.bool()[:, None, None]
        )

    def forward(
        self, latents: Tensor, timesteps: Tensor, condition: SanaCondition, *, step_cache: RowStepCache | None = None
    ) -> Tensor:
        """latents [B, C, h, w], times [B] float32 in [0, 1], a condition of as many rows -> velocity [B, C, h, w].

        step_cache: spares the blocks of some rows.
        """
        p = self.config.patch_size
        channels = self.config.in_channels
        shape = list(latents.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % p or shape[3] % p:
            raise ValueError(
                f"got latents {shape}: expected [B, {channels}, h, w] with sides that are multiples of {p}"
            )
        if not shape[0] == len(timesteps) == len(condition.tokens):
            raise ValueError(
                f"got {shape[0]} latents, {len(timesteps)} timesteps, a condition of {len(condition.tokens)} rows: "
                "expected as many; condition.select_rows(index) repeats and picks rows"
            )
        tokens = rearrange(self.patch_embed(latents), "B D h w -> B (h w) D")
        time, shifts = self.embed_timesteps(timesteps)

        height = shape[2] // p

        def run_blocks(rows: list[int]) -> Tensor:
            index = torch.tensor(rows, device=tokens.device)
            return self.run_blocks(tokens[index], shifts[index], condition.select_rows(index), height=height)

        if step_cache is not None:
            x = step_cache.run(tokens, run_blocks)
        else:
            x = self.run_blocks(tokens, shifts, condition, height=height)
        shift, scale = (self.scale_shift_table + time[:, None]).unbind(1)
        x = self.out_proj(adaln_modulate(x, scale, shift, FINAL_NORM_EPS))
        return rearrange(x, "B (h w) (py px C) -> B C (h py) (w px)", h=height, py=p, px=p)

    def run_blocks(self, x: Tensor, shifts: Tensor, condition: SanaCondition, *, height: int) -> Tensor:
        """x [B, L, D] through all blocks, shifts [B, 6, D] and a condition of as many rows -> [B, L, D]."""
        for block, keys, values in zip(self.blocks, condition.keys, condition.values, strict=True):
            x = block(x, shifts, keys, values, condition.attention_mask, height=height)
        return x

    def embed_timesteps(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """times [B] in [0, 1] -> embedded [B, D], and what all blocks share of their shifts, scales and gates, [B, 6,
        D]."""
        time = self.time_embed(
            timestep_embedding(TIMESTEP_SCALE * timesteps.float(), TIMESTEP_EMBED_DIM).to(self.scale_shift_table.dtype)
        )
        return time, rearrange(self.modulation(F.silu(time)), "B (six D) -> B six D", six=N_MODULATIONS)
