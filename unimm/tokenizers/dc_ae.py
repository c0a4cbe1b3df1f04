"""DC-AE, the deep compression autoencoder of Sana: images to a small grid of wide latents and back.

Chen et al. 2024, arXiv 2410.10733; docs/originals/blocks.md, "DC-AE". Parameters carry the released names, but for the
queries, keys and values, which are one projection.

Axes: B batch, C channels, h w grid, H heads, K head, r rows of a linear attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.component import DIFFUSERS_WEIGHT_FILES, PretrainedComponent
from unimm.checkpoint.config_io import (
    JsonLayout,
    LayerCount,
    PositiveFloat,
    PositiveInt,
    check_data,
    read_config,
    read_value,
    write_config,
)
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.keymap import KeyMap, Rename, equal_slices
from unimm.checkpoint.load import Shapes
from unimm.kernels import rms_norm
from unimm.nn.linear_attention import MixFFN, channels_first, channels_last, linear_attention

NORM_EPS = 1e-5  # of the norms
MLP_EXPANSION = 4  # of the feed-forward

CONVOLUTION_KEY_MAP = KeyMap(Rename("{*}", "{*}"))
ATTENTION_KEY_MAP = equal_slices([f"{{*}}.attn.to_{name}.weight" for name in "qkv"], "{*}.attn.to_qkv.weight")
ATTENTION_KEY_MAP += KeyMap(Rename("{*}.conv_out.norm.{}", "{*}.conv_norm.{}"))


@dataclass(frozen=True, kw_only=True)
class DCAELevel:
    """One size of the grid: blocks of one width. kernels: of the attention's wider scales; None for blocks of
    convolutions."""

    width: int
    n_blocks: int
    kernels: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class DCAEConfig:
    """Numbers of the autoencoder. Levels go from the finest to the coarsest, in the decoder too.

    Pixels lie in [-1, 1]; a latent is `scaling_factor` times the encoder's output.
    """

    in_channels: PositiveInt
    latent_channels: PositiveInt
    head_dim: PositiveInt
    scaling_factor: PositiveFloat
    encoder: tuple[DCAELevel, ...]
    decoder: tuple[DCAELevel, ...]

    def __post_init__(self) -> None:
        levels = (*self.encoder, *self.decoder)
        if len(self.encoder) != len(self.decoder) or len(self.encoder) < 1:
            raise ValueError(
                f"got {len(self.encoder)} levels down, {len(self.decoder)} up: expected as many, at least one"
            )
        if min(self.in_channels, self.latent_channels, self.head_dim, *(min(x.width, x.n_blocks) for x in levels)) < 1:
            raise ValueError(f"got {self}: expected positive numbers")
        if not self.scaling_factor > 0:
            raise ValueError(
                f"got scaling_factor {self.scaling_factor}: expected a positive number; 1 leaves latents as they are"
            )
        for side in (self.encoder, self.decoder):
            for fine, coarse in pairwise(side):
                if 4 * fine.width % coarse.width:
                    raise ValueError(
                        f"got widths {fine.width}, {coarse.width}: four of the first must divide by the second"
                    )
            if side[-1].width % self.latent_channels:
                raise ValueError(
                    f"got a last width {side[-1].width}: expected a multiple of {self.latent_channels} latents"
                )
        for level in levels:
            if level.kernels is not None and (level.width % self.head_dim or any(k % 2 == 0 for k in level.kernels)):
                raise ValueError(f"got {level}: expected a multiple of the heads' {self.head_dim}, and odd kernels")

    @property
    def stride(self) -> int:
        """Pixels a latent, along each side."""
        return 2 ** (len(self.encoder) - 1)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DCAEConfig:
        """Read a released config.json. Raises ValueError for what Sana's does not have: other norms, blocks,
        shortcuts."""
        check_data(data, LAYOUT)
        levels = {side: cls._levels(data, side) for side in ("encoder", "decoder")}
        return read_config(cls, data, LAYOUT, given=levels)

    @staticmethod
    def _levels(data: Mapping[str, Any], side: str) -> tuple[DCAELevel, ...]:
        names = [f"{side}_{name}" for name in LEVEL_LISTS]
        kind = Annotated[str, tuple(BLOCK_ATTENDS)]
        one_kind = isinstance(data[names[2]], str)
        types = (PositiveInt, LayerCount, kind, tuple[PositiveInt, ...])
        hints = [kind if one is kind and one_kind else tuple[one, ...] for one in types]  # type: ignore[valid-type]
        widths, counts, kinds, kernels = (
            read_value(data, *pair, layout=LAYOUT) for pair in zip(names, hints, strict=True)
        )
        kinds = (kinds,) * len(widths) if one_kind else kinds
        if not len(widths) == len(counts) == len(kinds) == len(kernels):
            raise ValueError(f"got {', '.join(names)} of different lengths: expected one entry a level")
        return tuple(
            DCAELevel(width=width, n_blocks=n, kernels=scales if BLOCK_ATTENDS[kind] else None)
            for width, n, kind, scales in zip(widths, counts, kinds, kernels, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """The config.json that `from_json` reads, and that diffusers does."""
        data = write_config(self, LAYOUT)
        block_types = {attends: name for name, attends in BLOCK_ATTENDS.items()}
        for side, levels in (("encoder", self.encoder), ("decoder", self.decoder)):
            data[f"{side}_block_out_channels"] = [level.width for level in levels]
            data[f"{side}_layers_per_block"] = [level.n_blocks for level in levels]
            data[f"{side}_block_types"] = [block_types[level.kernels is not None] for level in levels]
            data[f"{side}_qkv_multiscales"] = [list(level.kernels or ()) for level in levels]
        return data


LEVEL_LISTS = ("block_out_channels", "layers_per_block", "block_types", "qkv_multiscales")
BLOCK_ATTENDS = {"ResBlock": False, "EfficientViTBlock": True}  # whether a released type of block attends
# of the config.json, but for the levels, which are spread over four lists a side
LAYOUT = JsonLayout(
    source="the released config.json of Sana's AutoencoderDC",
    keys={
        "in_channels": "in_channels",
        "latent_channels": "latent_channels",
        "head_dim": "attention_head_dim",
        "scaling_factor": "scaling_factor",
    },
    defaults={"in_channels": 3},
    required=(
        *("latent_channels", "attention_head_dim", "scaling_factor"),
        *(f"{side}_{name}" for side in ("encoder", "decoder") for name in LEVEL_LISTS),
    ),
    fixed={
        "_class_name": "AutoencoderDC",
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
        "decoder_conv_act_fn": "relu",
    },
)


class ChannelRMSNorm(nn.Module):
    """RMS norm over the channels, with a bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C]"""
        return rms_norm(x, self.weight, NORM_EPS) + self.bias


class DCAEResBlock(nn.Module):
    """Convolution, SiLU, convolution, norm; and its input added."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = ChannelRMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w]"""
        return x + channels_first(self.norm(channels_last(self.conv2(F.silu(self.conv1(x))))))


class MultiscaleProjection(nn.Module):
    """Queries, keys and values of a wider neighbourhood: a depthwise convolution, then 1x1 inside each group of K."""

    def __init__(self, dim: int, kernel: int, head_dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
        self.proj_out = nn.Conv2d(dim, dim, 1, groups=dim // head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x))


class MultiscaleLinearAttention(nn.Module):
    """Linear attention at several scales, normed, and its input added.

    Each run of 3 K channels is the query, key and value of one head: so `to_q`, `to_k` and `to_v` of the released file
    are thirds of the list of channels, and not the three roles.
    """

    def __init__(self, dim: int, head_dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(MultiscaleProjection(3 * dim, kernel, head_dim) for kernel in kernels)
        self.to_out = nn.Linear((1 + len(kernels)) * dim, dim, bias=False)
        self.norm_out = ChannelRMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w]"""
        y = channels_first(self.to_qkv(channels_last(x)))
        y = torch.cat((y, *(scale(y) for scale in self.to_qkv_multiscale)), 1)
        q, k, v = rearrange(y, "B (H r K) h w -> r B H (h w) K", r=3, K=self.head_dim)
        y = rearrange(linear_attention(q, k, v), "B H (h w) K -> B h w (H K)", h=x.shape[2]).to(x.dtype)
        return x + channels_first(self.norm_out(self.to_out(y)))


class EfficientViTBlock(nn.Module):
    """Attention, then the feed-forward, normed, and its input added. arXiv 2205.14756, figure 2."""

    def __init__(self, dim: int, head_dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(dim, head_dim, kernels)
        self.conv_out = MixFFN(dim, MLP_EXPANSION * dim)
        self.conv_norm = ChannelRMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w]"""
        x = self.attn(x)
        return x + channels_first(self.conv_norm(self.conv_out(channels_last(x))))


class DCAEDownsample(nn.Module):
    """Half the size: a convolution, beside the means of the channels that the four pixels make."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h/2, w/2]"""
        y = self.conv(x)
        return y + average_channel_groups(F.pixel_unshuffle(x, 2), y.shape[1])


class DCAEUpsample(nn.Module):
    """Twice the size: a convolution of repeated pixels, beside channels that become the four pixels."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', 2h, 2w]"""
        y = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y + F.pixel_shuffle(repeat_channels(x, 4 * y.shape[1]), 2)


def average_channel_groups(x: Tensor, channels: int) -> Tensor:
    """x [B, C, h, w] -> [B, channels, h, w], the means of neighbouring channels."""
    return reduce(x, "B (C g) h w -> B C h w", "mean", C=channels)


def repeat_channels(x: Tensor, channels: int) -> Tensor:
    """x [B, C, h, w] -> [B, channels, h, w], each channel repeated."""
    return x.repeat_interleave(channels // x.shape[1], 1)


def dc_ae_blocks(level: DCAELevel, head_dim: int) -> list[nn.Module]:
    """The blocks of a level."""
    if level.kernels is None:
        return [DCAEResBlock(level.width) for _ in range(level.n_blocks)]
    return [EfficientViTBlock(level.width, head_dim, level.kernels) for _ in range(level.n_blocks)]


class DCAEEncoder(nn.Module):
    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        levels = config.encoder
        self.conv_in = nn.Conv2d(config.in_channels, levels[0].width, 3, padding=1)
        downs = [[DCAEDownsample(fine.width, coarse.width)] for fine, coarse in pairwise(levels)]
        self.down_blocks = nn.ModuleList(
            nn.Sequential(*dc_ae_blocks(level, config.head_dim), *down)
            for level, down in zip(levels, [*downs, []], strict=True)
        )
        self.conv_out = nn.Conv2d(levels[-1].width, config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> [B, C, h, w]"""
        x = self.conv_in(image)
        for level in self.down_blocks:
            x = level(x)
        y = self.conv_out(x)
        return y + average_channel_groups(x, y.shape[1])


class DCAEDecoder(nn.Module):
    """The encoder's mirror. Levels are numbered as the encoder's: `up_blocks.0` is the finest."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        levels = config.decoder
        self.conv_in = nn.Conv2d(config.latent_channels, levels[-1].width, 3, padding=1)
        ups = [[DCAEUpsample(coarse.width, fine.width)] for fine, coarse in pairwise(levels)]
        self.up_blocks = nn.ModuleList(
            nn.Sequential(*up, *dc_ae_blocks(level, config.head_dim))
            for level, up in zip(levels, [*ups, []], strict=True)
        )
        self.norm_out = ChannelRMSNorm(levels[0].width)
        self.conv_out = nn.Conv2d(levels[0].width, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] -> image [B, 3, H, W]"""
        x = self.conv_in(z)
        x = x + repeat_channels(z, x.shape[1])
        for level in reversed(self.up_blocks):
            x = level(x)
        return self.conv_out(F.relu(channels_first(self.norm_out(channels_last(x)))))


class DCAE(PretrainedComponent):
    """Encoder and decoder; no noise in between."""

    WEIGHT_FILES = DIFFUSERS_WEIGHT_FILES

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = DCAEEncoder(config)
        self.decoder = DCAEDecoder(config)

    @classmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        return cls(DCAEConfig.from_json(read_json(folder / "config.json", required=True)))

    def key_map(self, shapes: Shapes) -> KeyMap:
        return dc_ae_key_map(self.config)

    def encode(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> latent [B, C, h, w], scaled."""
        stride = self.config.stride
        channels = self.config.in_channels
        if image.ndim != 4 or image.shape[1] != channels or image.shape[2] % stride or image.shape[3] % stride:
            raise ValueError(
                f"got an image of shape {list(image.shape)}, expected [B, {channels}, H, W] with sides that are "
                f"multiples of {stride}: resize or crop it first"
            )
        return self.config.scaling_factor * self.encoder(image)

    def decode(self, latent: Tensor) -> Tensor:
        """latent [B, C, h, w] -> image [B, 3, H, W], about [-1, 1] and not clamped."""
        channels = self.config.latent_channels
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise ValueError(f"got a latent of shape {list(latent.shape)}, expected [B, {channels}, h, w]: see encode")
        return self.decoder(latent / self.config.scaling_factor)


def dc_ae_key_map(config: DCAEConfig) -> KeyMap:
    """The key map of the released layout, without the entries of parts that the config lacks."""
    attends = any(level.kernels is not None for level in (*config.encoder, *config.decoder))
    return ATTENTION_KEY_MAP + CONVOLUTION_KEY_MAP if attends else CONVOLUTION_KEY_MAP
