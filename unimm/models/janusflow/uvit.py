"""JanusFlow's shallow U-ViTs: latents to tokens, and tokens to a velocity, with one level and one skip connection.

docs/originals/janusflow.md, "Shallow U-ViTs". The blocks are ConvNeXt's (arXiv 2201.03545; its global response norm is
from 2301.00808), modulated by the time. Parameters have the released names.

Axes: B batch, C channels, H W sides of a latent, h w grid of tokens, D model (width of the time embedding).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.config_io import JsonLayout, PositiveFloat, PositiveInt, read_config, read_value, write_config
from unimm.nn.layers import RMSNorm
from unimm.nn.timestep import TimestepMLP, timestep_embedding

# of a ConvNeXt block
MLP_RATIO = 4
DEPTHWISE_KERNEL_SIZE = 7
UPSAMPLE_FACTOR = 2  # of each upsampling of the decoder
GRN_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class UViTConfig:
    """The fields that encoder and decoder share; the defaults are the release's."""

    dim: PositiveInt = 768  # of the encoder's blocks, and so of the skip connection
    n_blocks: Annotated[int, range(10_001)] = 2  # of the middle; 0 for none
    time_dim: PositiveInt = 2048
    norm_eps: PositiveFloat = 1e-6
    bias: bool = True

    # field -> its key in `params` of a released config
    KEYS: ClassVar = {
        "n_blocks": "layers_in_middle",
        "time_dim": "hidden_size",
        "norm_eps": "norm_eps",
        "bias": "use_bias",
    }

    def __post_init__(self) -> None:
        if min(self.dim, self.time_dim) < 1 or self.n_blocks < 0 or self.dim % 2:
            raise ValueError(
                f"got {self}: expected positive numbers, and an even width for the cosines and sines of the time "
                "embedding"
            )

    @classmethod
    def from_json(cls, params: Mapping[str, Any]) -> Self:
        """Read the params of a released config: the release's for missing ones, kernel - stride for a null padding.

        Raises ValueError for what the release does not have.
        """
        layout = cls._layout()
        given: dict[str, Any] = {}
        if widths := read_value(params, "block_out_channels", tuple[PositiveInt, ...], (), layout=layout):
            given["dim"] = widths[-1]
        if "padding" in params and params["padding"] is None and "padding" in cls.KEYS:
            sizes = [read_value(params, key, PositiveInt, layout=layout) for key in ("kernel_size", "stride")]
            given["padding"] = sizes[0] - sizes[1]
        if not read_value(params, "use_mid_block", bool, True, layout=layout):
            given["n_blocks"] = 0
        return read_config(cls, params, layout, given=given)

    def to_json(self) -> dict[str, Any]:
        """The params that `from_json` reads."""
        more = {"block_out_channels": [self.dim], "use_mid_block": self.n_blocks > 0}
        return write_config(self, self._layout()) | more

    @classmethod
    def _layout(cls) -> JsonLayout:
        fixed = {"elementwise_affine": True}
        return JsonLayout(
            name="the params of a U-ViT", source="the release", keys=cls.KEYS, fixed=fixed, constants={"dropout": 0.0}
        )


@dataclass(frozen=True, kw_only=True)
class UViTEncoderConfig(UViTConfig):
    """The encoder: a convolution over patches, then blocks."""

    in_channels: PositiveInt = 4
    kernel_size: PositiveInt = 2
    stride: PositiveInt = 2
    padding: int = 0

    KEYS: ClassVar = {
        **UViTConfig.KEYS,
        "in_channels": "input_channels",
        "kernel_size": "kernel_size",
        "stride": "stride",
        "padding": "padding",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.padding < 0:
            raise ValueError(f"got {self}: expected a padding of 0 or more; give the kernel the stride's size, or more")

    def grid_size(self, size: int) -> int:
        """The number of tokens along a side of a latent."""
        return (size + 2 * self.padding - self.kernel_size) // self.stride + 1


@dataclass(frozen=True, kw_only=True)
class UViTDecoderConfig(UViTConfig):
    """The decoder: blocks over tokens and skip connection, then upsampling by 2 `n_upsamples` times."""

    in_channels: PositiveInt = 768
    out_channels: PositiveInt = 4
    n_upsamples: Annotated[int, range(1, 11)] = 1

    KEYS: ClassVar = {
        **UViTConfig.KEYS,
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "n_upsamples": "upsamples",
    }


class GlobalResponseNorm(nn.Module):
    """bias + (weight * g / mean(g) + 1) * x, g the L2 norm of a channel over the grid. arXiv 2301.00808, section 3."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return self.bias + (self.weight * (norms / (norms.mean(-1, keepdim=True) + GRN_EPS)) + 1) * x


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, norm, linear, GELU, global response norm, linear; the sum with x is modulated by the time."""

    def __init__(self, dim: int, config: UViTConfig):
        super().__init__()
        hidden = MLP_RATIO * dim
        self.depthwise = nn.Conv2d(
            dim, dim, DEPTHWISE_KERNEL_SIZE, padding=DEPTHWISE_KERNEL_SIZE // 2, groups=dim, bias=config.bias
        )
        self.norm = RMSNorm(dim, config.norm_eps)
        self.channelwise_linear_1 = nn.Linear(dim, hidden, bias=config.bias)
        self.channelwise_norm = GlobalResponseNorm(hidden)
        self.channelwise_linear_2 = nn.Linear(hidden, dim, bias=config.bias)
        self.cond_embeds_mapper = nn.Linear(config.time_dim, 2 * dim, bias=config.bias)

    def forward(self, x: Tensor, time_embed: Tensor) -> Tensor:
        """x [B, C, h, w], time_embed [B, D] -> [B, C, h, w]."""
        y = self.norm(rearrange(self.depthwise(x), "B C h w -> B h w C"))
        y = self.channelwise_linear_2(self.channelwise_norm(F.gelu(self.channelwise_linear_1(y))))
        x = x + rearrange(y, "B h w C -> B C h w")
        scale, shift = rearrange(self.cond_embeds_mapper(F.silu(time_embed)), "B (two C) -> two B C 1 1", two=2)
        return shift + x * (1 + scale)


class ConvNeXtStack(nn.Module):
    """Blocks of one width."""

    def __init__(self, dim: int, config: UViTConfig):
        super().__init__()
        self.res_blocks = nn.ModuleList(ConvNeXtBlock(dim, config) for _ in range(config.n_blocks))

    def forward(self, x: Tensor, time_embed: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x, time_embed)
        return x


class PixelShuffleUpsample(nn.Module):
    """Norm, a 1x1 convolution, and a pixel shuffle to twice the size."""

    def __init__(self, dim: int, out_dim: int, config: UViTConfig):
        super().__init__()
        self.norm = RMSNorm(dim, config.norm_eps)
        self.unpatch_conv = nn.Conv2d(dim, out_dim * UPSAMPLE_FACTOR**2, 1, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', 2h, 2w]."""
        return F.pixel_shuffle(self.unpatch_conv(_channel_norm(self.norm, x)), UPSAMPLE_FACTOR)


class ShallowUViTEncoder(nn.Module):
    """Noised latents and their times to a grid of tokens and to time embeddings."""

    def __init__(self, config: UViTEncoderConfig):
        super().__init__()
        self.config = config
        self.time_embed = TimestepMLP(config.dim, config.time_dim, bias=config.bias)
        self.in_conv = nn.Conv2d(config.in_channels, config.dim, config.kernel_size, config.stride, config.padding)
        self.mid_block = ConvNeXtStack(config.dim, config)

    def forward(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W], times [B] from 0 at noise to 1000 at data -> tokens [B, C', h, w], time embeddings [B, D].

        The tokens are also the skip connection of the decoder.
        """
        time_embed = self.time_embed(timestep_embedding(times, self.config.dim).to(x.dtype))
        return self.mid_block(self.in_conv(x), time_embed), time_embed


class ShallowUViTDecoder(nn.Module):
    """The language model's output at the tokens, concatenated with the encoder's, to a velocity."""

    def __init__(self, config: UViTDecoderConfig):
        super().__init__()
        self.config = config
        self.input_norm = RMSNorm(config.in_channels, config.norm_eps)
        dim = config.in_channels + config.dim
        self.mid_block = ConvNeXtStack(dim, config)
        widths = (dim, *[config.dim] * (config.n_upsamples - 1), config.out_channels)
        self.out_convs = nn.ModuleList(PixelShuffleUpsample(dim, out, config) for dim, out in pairwise(widths))

    def forward(self, x: Tensor, skip: Tensor, time_embed: Tensor) -> Tensor:
        """x [B, C, h, w], skip [B, C', h, w], time_embed [B, D] -> [B, out_channels, H, W]."""
        x = self.mid_block(torch.cat((_channel_norm(self.input_norm, x), skip), 1), time_embed)
        for out_conv in self.out_convs:
            x = out_conv(x)
        return x


def _channel_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """The norm over the channels of x [B, C, h, w]."""
    return rearrange(norm(rearrange(x, "B C h w -> B h w C")), "B h w C -> B C h w")
