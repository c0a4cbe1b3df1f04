"""The KL autoencoder of FLUX and of SDXL: images to a grid of continuous latents and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.component import DIFFUSERS_WEIGHT_FILES, PretrainedComponent, write_component
from unimm.checkpoint.config_io import (
    JsonConfig,
    JsonLayout,
    LayerCount,
    PositiveFloat,
    PositiveInt,
    read_config,
    read_section,
    read_value,
    write_config,
)
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import Shapes
from unimm.tokenizers.kl_layouts import FLUX_KEY_MAP, FLUX_WEIGHT_FILES, kl_diffusers_key_map, kl_key_map

N_GROUPS = 32  # GroupNorm groups, fixed in every release
NORM_EPS = 1e-6


def check_levels(config: object, multipliers: Sequence[int], *, counts: Sequence[int], widths: Iterable[int]) -> None:
    """Raise ValueError for a convolutional autoencoder without levels, with counts below 1, or with a level whose width
    the groups of the norm do not divide."""
    if not multipliers or min((*counts, *multipliers)) < 1:
        raise ValueError(f"got {config}, expected positive counts and one multiplier per level: correct the config")
    for width in widths:
        if width < N_GROUPS or width % N_GROUPS:
            raise ValueError(
                f"got a level of width {width}, expected a multiple of {N_GROUPS} (the groups of the norm): "
                "change ch or ch_mult"
            )


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(JsonConfig):
    """Numbers of the autoencoder; the defaults are FLUX.1's.

    Pixels lie in [-1, 1]; a latent is `scale * (z - shift)`, which makes its mean 0 and its deviation about 1.
    """

    in_channels: PositiveInt = 3
    out_channels: PositiveInt = 3
    width: PositiveInt = 128
    channel_multipliers: tuple[PositiveInt, ...] = (1, 2, 4, 4)
    n_res_blocks: LayerCount = 2
    latent_channels: PositiveInt = 16
    scaling_factor: PositiveFloat = 0.3611
    shift_factor: float = 0.1159
    quant_convs: bool = False  # 1x1 convolutions on both sides of the latent, as in Stable Diffusion up to XL

    # `vae_config` of BAGEL's config.json, in FLUX's words: FLUX.1's number for a missing key
    JSON: ClassVar = JsonLayout(
        name="the autoencoder's config",
        keys={
            "in_channels": "in_channels",
            "out_channels": "out_ch",
            "width": "ch",
            "channel_multipliers": "ch_mult",
            "n_res_blocks": "num_res_blocks",
            "latent_channels": "z_channels",
            "scaling_factor": "scale_factor",
            "shift_factor": "shift_factor",
            "quant_convs": "use_quant_conv",
        },
        defaults={"use_quant_conv": False},
        derived={"downsample": "stride"},
        omit_defaults=True,
    )

    def __post_init__(self) -> None:
        counts = (self.in_channels, self.out_channels, self.n_res_blocks, self.latent_channels)
        widths = [self.width * multiplier for multiplier in self.channel_multipliers]
        check_levels(self, self.channel_multipliers, counts=counts, widths=widths)
        if not self.scaling_factor > 0:
            raise ValueError(
                f"got scale_factor {self.scaling_factor}, expected a positive number: 1 leaves latents as they are"
            )

    @property
    def stride(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, finest first."""
        return tuple(self.width * multiplier for multiplier in self.channel_multipliers)

    @classmethod
    def from_diffusers(cls, data: Mapping[str, Any]) -> AutoencoderKLConfig:
        """Read the config.json of a diffusers AutoencoderKL, with that class's numbers for missing keys.

        Raises ValueError for what the released ones do not have: other norms, activations, blocks, latent statistics.
        """
        layout = DIFFUSERS_LAYOUT
        widths = read_value(data, "block_out_channels", tuple[PositiveInt, ...], (64,), layout=layout)
        quant_convs, post_quant_convs = (
            read_value(data, f"use_{name}", bool, True, layout=layout) for name in ("quant_conv", "post_quant_conv")
        )
        if not widths or any(width % widths[0] for width in widths) or post_quant_convs != quant_convs:
            raise ValueError(
                f"got block_out_channels {list(widths)}, use_quant_conv {quant_convs}, use_post_quant_conv "
                f"{post_quant_convs}: expected multiples of the first width, and both convolutions or none"
            )
        levels = {"width": widths[0], "channel_multipliers": tuple(width // widths[0] for width in widths)}
        return read_config(cls, data, DIFFUSERS_LAYOUT, given=levels)

    def to_diffusers(self) -> dict[str, Any]:
        """The mapping that `from_diffusers` reads, and that diffusers does."""
        n_levels = len(self.channel_multipliers)
        block_types = {
            "down_block_types": ["DownEncoderBlock2D"] * n_levels,
            "up_block_types": ["UpDecoderBlock2D"] * n_levels,
        }
        return write_config(self, DIFFUSERS_LAYOUT) | block_types


# of diffusers' config.json, but for the multipliers of the width
DIFFUSERS_LAYOUT = JsonLayout(
    source="every released AutoencoderKL",
    keys={
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "n_res_blocks": "layers_per_block",
        "latent_channels": "latent_channels",
        "scaling_factor": "scaling_factor",
        "shift_factor": "shift_factor",
        "quant_convs": "use_quant_conv",
    },
    defaults={
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "shift_factor": 0.0,
        "use_quant_conv": True,
    },
    fixed={
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "norm_num_groups": N_GROUPS,
        "mid_block_add_attention": True,
        "latents_mean": None,
        "latents_std": None,
    },
    unwritten=("latents_mean", "latents_std"),
    derived={"block_out_channels": "widths", "use_post_quant_conv": "quant_convs"},
)


def group_norm(width: int) -> nn.GroupNorm:
    """The only norm of the autoencoder."""
    return nn.GroupNorm(N_GROUPS, width, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """Residual block: twice norm, swish, 3x3 convolution."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = group_norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)
        self.changes_width = width_in != width_out

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h, w]"""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (self.nin_shortcut(x) if self.changes_width else x) + y


class SpatialAttention(nn.Module):
    """Attention between all positions of the grid, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w]"""
        y = self.norm(x)
        q, k, v = (rearrange(part(y), "B C h w -> B 1 (h w) C") for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(y, "B 1 (h w) C -> B C h w", h=x.shape[2]))


class KLMiddle(nn.Module):
    """Block, attention, block, at the coarsest level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width)
        self.attn_1 = SpatialAttention(width)
        self.block_2 = ResnetBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h/2, w/2]"""
        # released weights expect the padding on the right and the bottom only
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, 2h, 2w]"""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class KLEncoderLevel(nn.Module):
    """One level of the encoder: blocks, then half the size (but for the last level)."""

    def __init__(self, width_in: int, width_out: int, *, n_blocks: int, last: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(width_out if i else width_in, width_out) for i in range(n_blocks))
        self.last = last
        if not last:
            self.downsample = Downsample(width_out)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.last else self.downsample(x)


class KLDecoderLevel(nn.Module):
    """One level of the decoder: blocks, then twice the size (but for the last level)."""

    def __init__(self, width_in: int, width_out: int, *, n_blocks: int, last: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(width_out if i else width_in, width_out) for i in range(n_blocks))
        self.last = last
        if not last:
            self.upsample = Upsample(width_out)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.last else self.upsample(x)


class KLEncoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, config.width, 3, padding=1)
        self.down = nn.ModuleList(
            KLEncoderLevel(width_in, width_out, n_blocks=config.n_res_blocks, last=level == len(widths) - 1)
            for level, (width_in, width_out) in enumerate(zip((config.width, *widths[:-1]), widths, strict=True))
        )
        self.mid = KLMiddle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> mean and log variance, stacked [B, 2 C, h, w]"""
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class KLDecoder(nn.Module):
    """The encoder's mirror, with one block more a level. Levels are numbered as the encoder's: `up.0` is the finest."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = KLMiddle(widths[-1])
        self.up = nn.ModuleList(
            KLDecoderLevel(width_in, width_out, n_blocks=config.n_res_blocks + 1, last=level == 0)
            for level, (width_in, width_out) in enumerate(zip((*widths[1:], widths[-1]), widths, strict=True))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] -> image [B, 3, H, W]"""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(PretrainedComponent):
    """Encoder and decoder; parameters carry the names of FLUX's released ae.safetensors."""

    WEIGHT_FILES = (*DIFFUSERS_WEIGHT_FILES[:-1], *FLUX_WEIGHT_FILES)

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = KLEncoder(config)
        self.decoder = KLDecoder(config)
        channels = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.quant_convs else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.quant_convs else nn.Identity()

    @classmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        """vae_config.json or config.json, in FLUX's words or in diffusers', or a section of a BAGEL's; FLUX.1's without
        one."""
        data: Mapping[str, Any] = read_json(folder / "vae_config.json") or read_json(folder / "config.json")
        if data.get("vae_config") is not None:
            data = read_section(data, "vae_config", AutoencoderKLConfig.JSON)
        diffusers = "block_out_channels" in data or "_class_name" in data
        return cls(AutoencoderKLConfig.from_diffusers(data) if diffusers else AutoencoderKLConfig.from_json(data))

    def key_map(self, shapes: Shapes) -> KeyMap:
        return kl_key_map(shapes, self.config.widths, quant_convs=self.config.quant_convs)

    def save_pretrained(self, folder: Path, *, layout: str = "diffusers") -> None:
        """Write config.json and the weights; layout "bfl": Black Forest Labs' names, in ae.safetensors."""
        if layout not in ("diffusers", "bfl"):
            raise ValueError(f"got layout {layout!r}: expected 'diffusers' or 'bfl'")
        config = self.config
        if layout == "diffusers":
            key_map = kl_diffusers_key_map(config.widths, quant_convs=config.quant_convs)
            write_component(self, folder, DIFFUSERS_WEIGHT_FILES[:-1], key_map, config.to_diffusers())
        else:
            write_component(self, folder, FLUX_WEIGHT_FILES[:1], FLUX_KEY_MAP, config.to_json())

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B, 3, H, W] in [-1, 1] -> mean, log variance of the posterior, each [B, C, h, w], before scaling."""
        stride = self.config.stride
        channels = self.config.in_channels
        if image.ndim != 4 or image.shape[1] != channels or image.shape[2] % stride or image.shape[3] % stride:
            raise ValueError(
                f"got an image of shape {list(image.shape)}, expected [B, {channels}, H, W] with sides that are "
                f"multiples of {stride}: resize or crop it first"
            )
        mean, logvar = rearrange(
            self.quant_conv(self.encoder(image.to(self.dtype))), "B (two C) h w -> two B C h w", two=2
        )
        return mean, logvar

    def encode(self, image: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> latent [B, C, h, w]: the mean, or a sample if given noise [B, C, h, w]."""
        mean, logvar = self.moments(image)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return self.config.scaling_factor * (z - self.config.shift_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """latent [B, C, h, w] -> image [B, 3, H, W], about [-1, 1] and not clamped."""
        channels = self.config.latent_channels
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise ValueError(f"got a latent of shape {list(latent.shape)}, expected [B, {channels}, h, w]: see encode")
        z = (latent / self.config.scaling_factor + self.config.shift_factor).to(self.dtype)
        return self.decoder(self.post_quant_conv(z))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which images and latents are cast to."""
        return self.decoder.conv_in.weight.dtype
