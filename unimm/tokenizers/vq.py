"""LlamaGen's VQ autoencoder, with which Janus generates images: images to a grid of codes and back.

Axes: B images, E features of a code, V codes, h w grid, n = h * w codes of an image in raster order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.checkpoint.config_io import JsonConfig, JsonLayout, LayerCount, PositiveInt
from unimm.kernels import nearest_code
from unimm.tokenizers.kl import Downsample, ResnetBlock, SpatialAttention, Upsample, check_levels, group_norm

# ids that `codebook_used` holds, whatever the size of the codebook
CODEBOOK_USED_SIZE = 65536


@dataclass(frozen=True, kw_only=True)
class VQConfig(JsonConfig):
    """Numbers of the autoencoder; the defaults are VQ-16's. Pixels lie in [-1, 1]."""

    channels: PositiveInt = 3
    width: PositiveInt = 128
    channel_multipliers: tuple[PositiveInt, ...] = (1, 1, 2, 2, 4)
    n_res_blocks: LayerCount = 2
    latent_channels: PositiveInt = 256
    n_codes: PositiveInt = 16384
    code_dim: PositiveInt = 8

    # of the params of a gen_vision_config; what its cls, VQ-16, implies is left out, as in the released config
    JSON: ClassVar = JsonLayout(
        name="the config of the image tokenizer",
        source="image_token_size and n_embed, at least, in its params",
        keys={
            "n_codes": "image_token_size",
            "code_dim": "n_embed",
            "width": "ch",
            "channel_multipliers": "ch_mult",
            "n_res_blocks": "num_res_blocks",
            "latent_channels": "z_channels",
        },
        defaults={"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "z_channels": 256},
        required=("image_token_size", "n_embed"),
        omit_defaults=True,
    )

    def __post_init__(self) -> None:
        counts = (self.channels, self.n_res_blocks, self.latent_channels, self.n_codes, self.code_dim)
        check_levels(self, self.channel_multipliers, counts=counts, widths=(self.width, *self.widths))

    @property
    def stride(self) -> int:
        """Pixels per code, along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, finest first."""
        return tuple(self.width * multiplier for multiplier in self.channel_multipliers)


class VQLevel(nn.Module):
    """Blocks, with attention after each at the coarsest level, then a change of size (but for the last level)."""

    def __init__(
        self, width_in: int, width_out: int, *, n_blocks: int, attends: bool, size: Literal["half", "same", "double"]
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(width_out if i else width_in, width_out) for i in range(n_blocks))
        self.attn = nn.ModuleList(SpatialAttention(width_out) for _ in range(n_blocks * attends))
        self.size = size
        if size == "half":
            self.downsample = Downsample(width_out)
        elif size == "double":
            self.upsample = Upsample(width_out)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h', w']"""
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if self.size == "same":
            return x
        return self.downsample(x) if self.size == "half" else self.upsample(x)


def vq_middle(width: int) -> nn.Sequential:
    """Block, attention, block, at the coarsest level."""
    return nn.Sequential(ResnetBlock(width, width), SpatialAttention(width), ResnetBlock(width, width))


class VQEncoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = config.widths
        last = len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            VQLevel(a, b, n_blocks=config.n_res_blocks, attends=i == last, size="same" if i == last else "half")
            for i, (a, b) in enumerate(zip((config.width, *widths[:-1]), widths, strict=True))
        )
        self.mid = vq_middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> [B, C, h, w]"""
        x = self.conv_in(image)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VQDecoder(nn.Module):
    """The encoder's mirror, with one block more a level. Levels run as they are used: `conv_blocks.0` is the
    coarsest."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        last = len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = vq_middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            VQLevel(a, b, n_blocks=config.n_res_blocks + 1, attends=i == 0, size="same" if i == last else "double")
            for i, (a, b) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] -> image [B, 3, H, W]"""
        x = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


@dataclass(frozen=True, kw_only=True)
class QuantizerOutput:
    """The quantiser's output: codes [B, E, h, w], whose gradient goes straight to z; ids [B, n]; two terms to train by.

    Both terms are the mean squared distance of z's direction from its code: `codebook` moves the code, `commitment` z.
    """

    codes: Tensor
    ids: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class VectorQuantizer(nn.Module):
    """A codebook on the unit sphere: lengths count neither of what is quantised nor of the codes."""

    codebook_used: Tensor

    def __init__(self, n_codes: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_codes, code_dim)
        # the ids chosen last in training. Nothing else reads it, but every released file has it
        self.register_buffer("codebook_used", torch.zeros(CODEBOOK_USED_SIZE))

    def nearest_ids(self, z: Tensor) -> Tensor:
        """z [B, E, h, w] -> ids [B, n] of the codes in the nearest direction, the lowest of equals."""
        ids = nearest_code(rearrange(z, "B E h w -> (B h w) E"), self.embedding.weight)
        return rearrange(ids, "(B n) -> B n", B=len(z))

    def lookup(self, ids: Tensor, grid: tuple[int, int]) -> Tensor:
        """ids [B, n] of a grid (h, w) -> codes [B, E, h, w], of length 1."""
        codes = F.normalize(F.embedding(ids, self.embedding.weight).float(), dim=-1)
        return rearrange(codes, "B (h w) E -> B E h w", h=grid[0]).to(self.embedding.weight.dtype)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """z [B, E, h, w]"""
        ids = self.nearest_ids(z)
        codes = self.lookup(ids, (z.shape[2], z.shape[3])).float()
        unit = F.normalize(z.float(), dim=1)
        return QuantizerOutput(
            codes=(unit + (codes - unit).detach()).to(z.dtype),
            ids=ids,
            codebook_loss=(codes - unit.detach()).square().mean(),
            commitment_loss=(codes.detach() - unit).square().mean(),
        )


class VQModel(nn.Module):
    """Encoder, codebook and decoder; parameters carry the names below `gen_vision_model.` of the released files."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VQEncoder(config)
        self.decoder = VQDecoder(config)
        self.quantize = VectorQuantizer(config.n_codes, config.code_dim)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)

    def encode(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> z [B, E, h, w], of any length: `quantize` uses its direction only."""
        stride = self.config.stride
        channels = self.config.channels
        if image.ndim != 4 or image.shape[1] != channels or image.shape[2] % stride or image.shape[3] % stride:
            raise ValueError(
                f"got an image of shape {list(image.shape)}, expected [B, {channels}, H, W] with sides that are "
                f"multiples of {stride}: resize or crop it first"
            )
        return self.quant_conv(self.encoder(image))

    def encode_ids(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> ids [B, n]"""
        return self.quantize.nearest_ids(self.encode(image))

    def decode(self, ids: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """ids [B, n] of a grid (h, w) -> image [B, 3, H, W], about [-1, 1] and not clamped."""
        if ids.ndim != 2 or ids.is_floating_point() or min(grid) < 1 or ids.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"got ids {list(ids.shape)} of {ids.dtype} for a grid of {grid[0]} x {grid[1]}, expected whole numbers "
                f"[B, {grid[0] * grid[1]}]: give the grid that the ids were made for"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.n_codes:
            raise ValueError(
                f"got ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {self.config.n_codes - 1}, the "
                "codes of this codebook: are they ids of text?"
            )
        return self.decode_codes(self.quantize.lookup(ids, grid))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """codes [B, E, h, w] -> image [B, 3, H, W]"""
        return self.decoder(self.post_quant_conv(codes))
