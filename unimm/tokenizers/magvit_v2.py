"""MAGVIT-v2 as Show-o has it: images to a grid of codes and back, quantised bit by bit without a lookup table.

Yu et al. 2023, arXiv 2310.05737; docs/originals/show_o.md, "MAGVIT-v2". A code is the signs of a vector, the first
channel the most significant bit of its id.

Axes: B images, C bits of a code, h w grid, n = h * w codes of an image in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.component import PretrainedComponent
from unimm.checkpoint.config_io import JsonConfig, JsonLayout, LayerCount, PositiveInt
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.keymap import Ignore, KeyMap, Rename
from unimm.checkpoint.load import Shapes
from unimm.tokenizers.kl import KLDecoderLevel, KLEncoderLevel, KLMiddle, check_levels, group_norm

MAX_BITS = 18  # of the paper
COMMITMENT_SHARE = 0.25  # how much more the squared distance weighs than its codebook half, in the released loss
# as diffusers and the released training write a model; the first is written
WEIGHT_FILES = ("pytorch_model.safetensors", "pytorch_model.bin", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class MagvitV2Config(JsonConfig):
    """Numbers of the autoencoder; the defaults are the released ones. Pixels lie in [-1, 1].

    Multipliers and blocks are of the levels, finest first; encoder and decoder have their own.
    """

    encoder_width: PositiveInt = 128
    encoder_multipliers: tuple[PositiveInt, ...] = (1, 2, 2, 4, 4)
    encoder_blocks: tuple[LayerCount, ...] = (4, 3, 4, 3, 4)
    decoder_width: PositiveInt = 128
    decoder_multipliers: tuple[PositiveInt, ...] = (1, 1, 2, 2, 4)
    decoder_blocks: tuple[LayerCount, ...] = (4, 4, 3, 4, 3)
    bits: Annotated[int, range(1, MAX_BITS + 1)] = 13

    # released files hold the class's name alone, which implies the rest
    JSON: ClassVar = JsonLayout(
        name="the config of the image tokenizer",
        source="showlab/magvitv2",
        keys={
            "encoder_width": "encoder_config.ch",
            "encoder_multipliers": "encoder_config.ch_mult",
            "encoder_blocks": "encoder_config.num_res_blocks",
            "decoder_width": "decoder_config.ch",
            "decoder_multipliers": "decoder_config.ch_mult",
            "decoder_blocks": "decoder_config.num_res_blocks",
            "bits": ("encoder_config.z_channels", "decoder_config.z_channels"),
        },
        defaults={
            "encoder_config.ch": 128,
            "encoder_config.ch_mult": (1, 2, 2, 4, 4),
            "encoder_config.num_res_blocks": (4, 3, 4, 3, 4),
            "decoder_config.ch": 128,
            "decoder_config.ch_mult": (1, 1, 2, 2, 4),
            "decoder_config.num_res_blocks": (4, 4, 3, 4, 3),
            "encoder_config.z_channels": 13,
        },
        fixed={"_class_name": "MAGVITv2"},
        omit_defaults=True,
    )

    def __post_init__(self) -> None:
        for multipliers, blocks, widths in (
            (self.encoder_multipliers, self.encoder_blocks, (self.encoder_width, *self.encoder_widths)),
            (self.decoder_multipliers, self.decoder_blocks, self.decoder_widths),
        ):
            check_levels(self, multipliers, counts=(*blocks, self.bits), widths=widths)
            if len(multipliers) != len(blocks) or len(multipliers) != len(self.encoder_multipliers):
                raise ValueError(
                    f"got {self}: expected as many levels in encoder and decoder, with a multiplier and a number of "
                    "blocks each; correct the config"
                )

    @property
    def stride(self) -> int:
        """Pixels per code, along each side."""
        return 2 ** (len(self.encoder_multipliers) - 1)

    @property
    def n_codes(self) -> int:
        """The number of codes."""
        return 2**self.bits

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels of the encoder's levels, finest first."""
        return tuple(self.encoder_width * multiplier for multiplier in self.encoder_multipliers)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's levels, finest first."""
        return tuple(self.decoder_width * multiplier for multiplier in self.decoder_multipliers)


class MagvitV2Encoder(nn.Module):
    """Levels of residual blocks, a middle with attention, and the convolution before the signs are taken."""

    def __init__(self, config: MagvitV2Config) -> None:
        super().__init__()
        widths = config.encoder_widths
        levels = zip((config.encoder_width, *widths[:-1]), widths, config.encoder_blocks, strict=True)
        self.conv_in = nn.Conv2d(3, config.encoder_width, 3, padding=1)
        self.down = nn.ModuleList(
            KLEncoderLevel(width_in, width_out, n_blocks=n, last=level == len(widths) - 1)
            for level, (width_in, width_out, n) in enumerate(levels)
        )
        self.mid = KLMiddle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.bits, config.bits, 1)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> z [B, C, h, w]"""
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class MagvitV2Decoder(nn.Module):
    """Codes to pixels. Levels are numbered as the encoder's: `up.0` is the finest."""

    def __init__(self, config: MagvitV2Config) -> None:
        super().__init__()
        widths = config.decoder_widths
        levels = zip((*widths[1:], widths[-1]), widths, config.decoder_blocks, strict=True)
        self.post_quant_conv = nn.Conv2d(config.bits, config.bits, 1)
        self.conv_in = nn.Conv2d(config.bits, widths[-1], 3, padding=1)
        self.mid = KLMiddle(widths[-1])
        self.up = nn.ModuleList(
            KLDecoderLevel(width_in, width_out, n_blocks=n, last=level == 0)
            for level, (width_in, width_out, n) in enumerate(levels)
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """codes [B, C, h, w] -> image [B, 3, H, W]"""
        x = self.mid(self.conv_in(self.post_quant_conv(codes)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


@dataclass(frozen=True, kw_only=True)
class LFQOutput:
    """codes [B, C, h, w], whose gradient goes straight to z; ids [B, n]; the terms to train by.

    commitment: mean squared distance of z from its code. entropy: of each bit's choice between -1 and 1, the mean over
    positions and bits; mean_entropy: of the choice averaged over positions, which training keeps high.
    """

    codes: Tensor
    ids: Tensor
    commitment: Tensor
    entropy: Tensor
    mean_entropy: Tensor


class LookupFreeQuantizer(nn.Module):
    """Signs as codes."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def nearest_ids(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] -> ids [B, n]; a value of exactly 0 is the bit 0."""
        weights = 2 ** torch.arange(self.bits - 1, -1, -1, device=z.device)
        return ((rearrange(z, "B C h w -> B (h w) C") > 0) * weights).sum(-1)

    def lookup(self, ids: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """ids [B, n] of a grid (h, w) -> codes [B, C, h, w] of -1 and 1."""
        return rearrange(code_bits(ids, self.bits), "B (h w) C -> B C h w", h=grid[0]).to(dtype)

    def forward(self, z: Tensor) -> LFQOutput:
        """z [B, C, h, w]"""
        ids = self.nearest_ids(z)
        codes = self.lookup(ids, (z.shape[2], z.shape[3]), z.dtype)
        # a softmax over -(z - 1)^2 and -(z + 1)^2, whose difference is 4 z
        logits = rearrange(4 * z.float(), "B C h w -> (B h w) C")
        return LFQOutput(
            codes=z + (codes - z).detach(),
            ids=ids,
            commitment=(codes - z).square().mean(),
            entropy=(F.softplus(logits) - logits * logits.sigmoid()).mean(),
            mean_entropy=_mean_choice_entropy(logits).mean(),
        )


def code_bits(ids: Tensor, bits: int) -> Tensor:
    """ids [...] -> their codes [..., bits] of -1 and 1, float32, the most significant bit first."""
    shifts = torch.arange(bits - 1, -1, -1, device=ids.device)
    return (((ids[..., None] >> shifts) & 1) * 2 - 1).float()


def _mean_choice_entropy(logits: Tensor) -> Tensor:
    """logits [N, C] -> entropy [C] of each bit's choice averaged over N, finite with its gradient for any logits.

    The choices are averaged from their own logits: 1 - p would be 0 for a p that has rounded to 1, and log 0 has no
    gradient.
    """
    choices = torch.stack((logits.sigmoid().mean(0), (-logits).sigmoid().mean(0)))
    return torch.special.entr(choices.clamp(min=torch.finfo(choices.dtype).tiny)).sum(0)


class MagvitV2(PretrainedComponent):
    """Encoder, quantiser and decoder; parameters carry the released names."""

    WEIGHT_FILES = WEIGHT_FILES

    def __init__(self, config: MagvitV2Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = MagvitV2Encoder(config)
        self.decoder = MagvitV2Decoder(config)
        self.quantize = LookupFreeQuantizer(config.bits)

    @classmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        return cls(MagvitV2Config.from_json(read_json(folder / "config.json", required=True)))

    def key_map(self, shapes: Shapes) -> KeyMap:
        return KEY_MAP

    def encode(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> z [B, C, h, w], whose signs are the codes."""
        stride = self.config.stride
        if (
            image.ndim != 4
            or image.shape[1] != 3
            or min(image.shape[2:]) < stride
            or any(side % stride for side in image.shape[2:])
        ):
            raise ValueError(
                f"got an image of shape {list(image.shape)}, expected [B, 3, H, W] with sides that are multiples of "
                f"{stride}: resize or crop it first"
            )
        return self.encoder(image)

    def encode_ids(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> ids [B, n]"""
        return self.quantize.nearest_ids(self.encode(image))

    def decode(self, ids: Tensor, *, grid: Sequence[int]) -> Tensor:
        """ids [B, n] of a grid (h, w) -> image [B, 3, H, W], about [-1, 1] and not clamped."""
        h, w = grid
        if ids.ndim != 2 or ids.is_floating_point() or min(grid) < 1 or ids.shape[1] != h * w:
            raise ValueError(
                f"got ids {list(ids.shape)} of {ids.dtype} for a grid of {h} x {w}, expected whole numbers "
                f"[B, {h * w}]: give the grid that the ids were made for"
            )
        if ids.numel() and not ids.is_meta and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.n_codes:
            raise ValueError(
                f"got ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {self.config.n_codes - 1}, the "
                "codes of this tokenizer: are they ids of text, or of masked places?"
            )
        return self.decode_codes(self.quantize.lookup(ids, (h, w), self.decoder.conv_in.weight.dtype))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """codes [B, C, h, w] -> image [B, 3, H, W]"""
        return self.decoder(codes)


# our names are the released ones
KEY_MAP = KeyMap(
    Rename("encoder.{*}", "encoder.{*}"),
    Rename("decoder.{*}", "decoder.{*}"),
    Ignore("quantize.{}", because="buffers: the table of codes and the values of bits, which follow from their number"),
)
