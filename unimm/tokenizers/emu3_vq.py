"""Emu3's vision tokenizer: images and videos to grids of codes and back.

A 2-D encoder works frame by frame, 3-D convolutions then halve the frames twice; an image stands for as many equal
frames as become one. All layers over time are causal. docs/originals/emu3.md, "Vision tokenizer".

Axes: B images or videos, T frames, t latent frames, C channels, E features of a code, Z channels of a latent, V codes,
h w grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.component import PretrainedComponent
from unimm.checkpoint.config_io import JsonConfig, JsonLayout, LayerCount, PositiveInt
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.keymap import KeyMap, Rename
from unimm.checkpoint.load import Shapes
from unimm.tokenizers.emu3_vq_layers import CausalConv3d, Emu3VQDecoder, Emu3VQEncoder
from unimm.tokenizers.kl import check_levels
from unimm.tokenizers.vq import QuantizerOutput

# rows whose distances to all codes are computed at once
DISTANCE_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class Emu3VQConfig(JsonConfig):
    """Numbers of the tokenizer, the released ones unless given. Pixels lie in [-1, 1].

    attention_levels: the levels, 0 the finest, whose blocks are followed by attention.
    """

    n_codes: PositiveInt = 32768
    code_dim: PositiveInt = 4
    latent_channels: PositiveInt = 4
    channels: PositiveInt = 3
    frames_per_latent: PositiveInt = 4
    width: PositiveInt = 256
    channel_multipliers: tuple[PositiveInt, ...] = (1, 2, 2, 4)
    n_res_blocks: LayerCount = 2
    attention_levels: tuple[int, ...] = (3,)

    JSON: ClassVar = JsonLayout(
        name="the vision tokenizer's config",
        source="BAAI/Emu3-VisionTokenizer",
        keys={
            "n_codes": "codebook_size",
            "code_dim": "embed_dim",
            "latent_channels": "z_channels",
            "channels": "in_channels",
            "frames_per_latent": "temporal_downsample_factor",
            "width": "ch",
            "channel_multipliers": "ch_mult",
            "n_res_blocks": "num_res_blocks",
            # the indices of levels, whatever the name says
            "attention_levels": "attn_resolutions",
        },
        fixed={"double_z": False, "dropout": 0.0},
        derived={"out_channels": "channels"},
        constants={"architectures": ["Emu3VisionVQModel"], "model_type": "Emu3VisionVQ"},
    )

    def __post_init__(self) -> None:
        counts = (self.channels, self.n_res_blocks, self.latent_channels, self.n_codes)
        check_levels(self, self.channel_multipliers, counts=counts, widths=self.widths)
        if self.code_dim != self.latent_channels:
            raise ValueError(
                f"got embed_dim {self.code_dim} and z_channels {self.latent_channels}: expected the same number, since "
                "codes and latents go through the same layers over time"
            )
        if self.frames_per_latent & (self.frames_per_latent - 1):
            raise ValueError(f"got temporal_downsample_factor {self.frames_per_latent}: expected a power of 2")
        if any(not 0 <= level < len(self.channel_multipliers) for level in self.attention_levels):
            raise ValueError(
                f"got attn_resolutions {list(self.attention_levels)}: expected levels, 0 to "
                f"{len(self.channel_multipliers) - 1}"
            )

    @property
    def stride(self) -> int:
        """Pixels per code, along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, finest first."""
        return tuple(self.width * multiplier for multiplier in self.channel_multipliers)


class NearestCodeQuantizer(nn.Module):
    """A codebook; a vector becomes the code at the least distance, lengths and all."""

    def __init__(self, n_codes: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_codes, code_dim)

    def nearest_ids(self, z: Tensor) -> Tensor:
        """z [B, E, h, w] -> ids [B, n] of the nearest codes in raster order, the lowest of equals."""
        rows = rearrange(z.float(), "B E h w -> (B h w) E")
        codes = self.embedding.weight.float()
        squares = codes.square().sum(1)
        ids = [
            (part.square().sum(1, keepdim=True) + squares - 2 * part @ codes.T).argmin(1)
            for part in rows.split(DISTANCE_ROWS)
        ]
        return rearrange(torch.cat(ids), "(B n) -> B n", B=len(z))

    def lookup(self, ids: Tensor, grid: tuple[int, int]) -> Tensor:
        """ids [B, n] of a grid (h, w) -> codes [B, E, h, w]."""
        return rearrange(self.embedding(ids), "B (h w) E -> B E h w", h=grid[0])

    def forward(self, z: Tensor) -> QuantizerOutput:
        """z [B, E, h, w]"""
        ids = self.nearest_ids(z)
        codes = self.lookup(ids, (z.shape[2], z.shape[3]))
        return QuantizerOutput(
            codes=z + (codes - z).detach(),
            ids=ids,
            codebook_loss=(codes.float() - z.detach().float()).square().mean(),
            commitment_loss=(codes.detach().float() - z.float()).square().mean(),
        )


class Emu3VQModel(PretrainedComponent):
    """Encoder, codebook and decoder; parameters carry the names of the released files."""

    def __init__(self, config: Emu3VQConfig) -> None:
        super().__init__()
        self.config = config
        n_halvings = config.frames_per_latent.bit_length() - 1
        self.encoder = Emu3VQEncoder(
            config.channels,
            config.width,
            config.latent_channels,
            widths=config.widths,
            n_blocks=config.n_res_blocks,
            attention_levels=config.attention_levels,
            n_halvings=n_halvings,
        )
        self.decoder = Emu3VQDecoder(
            config.channels,
            config.code_dim,
            config.latent_channels,
            widths=config.widths,
            n_blocks=config.n_res_blocks,
            attention_levels=config.attention_levels,
            n_halvings=n_halvings,
        )
        self.quantize = NearestCodeQuantizer(config.n_codes, config.code_dim)
        self.quant_conv = CausalConv3d(config.latent_channels, config.code_dim, (3, 1, 1))
        self.post_quant_conv = CausalConv3d(config.code_dim, config.latent_channels, (3, 1, 1))

    @classmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        """The tokenizer of BAAI/Emu3-VisionTokenizer's layout, without weights."""
        return cls(Emu3VQConfig.from_json(read_json(folder / "config.json", required=True)))

    def key_map(self, shapes: Shapes) -> KeyMap:
        """The released names are ours."""
        return KeyMap(Rename("{*}", "{*}"))

    # ---- images

    def encode(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1], sides multiples of the stride -> what is quantized [B, E, h, w]."""
        self._check_frames(image, n_axes=4)
        # as many equal frames as become one: they are encoded once
        frames = repeat(self.encoder.encode_frames(image), "B Z h w -> B Z T h w", T=self.config.frames_per_latent)
        return self.quant_conv(self.encoder.merge_frames(frames))[:, :, 0]

    def encode_ids(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> ids [B, h, w]"""
        z = self.encode(image)
        return self.quantize.nearest_ids(z).unflatten(1, z.shape[2:])

    def decode(self, ids: Tensor) -> Tensor:
        """ids [B, h, w] -> image [B, 3, H, W], about [-1, 1] and not clamped."""
        self._check_ids(ids, n_axes=3)
        return self.decode_codes(self.quantize.lookup(ids.flatten(1), (ids.shape[1], ids.shape[2])))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """codes [B, E, h, w] -> image [B, 3, H, W]; the first of the frames that a latent stands for.

        Layers over time are causal, so that the first frame of each depends on the first frame alone.
        """
        codes = codes[:, :, None]
        latents, styles = self.decoder.split_frames(self.post_quant_conv(codes), codes, first_only=True)
        return self.decoder.decode_frames(latents[:, :, 0], styles[:, :, 0])

    # ---- videos

    def encode_video_ids(self, frames: Tensor) -> Tensor:
        """frames [B, T, 3, H, W] in [-1, 1], T a multiple of `frames_per_latent` -> ids [B, t, h, w]."""
        self._check_frames(frames, n_axes=5)
        n = self.config.frames_per_latent
        if frames.shape[1] == 0 or frames.shape[1] % n:
            raise ValueError(
                f"got {frames.shape[1]} frames: expected a multiple of {n}; leave some out, or repeat the last"
            )
        latents = self.encoder.encode_frames(frames.flatten(0, 1))
        latents = rearrange(latents, "(B T) Z h w -> B Z T h w", B=len(frames))
        z = self.quant_conv(self.encoder.merge_frames(latents))
        ids = self.quantize.nearest_ids(rearrange(z, "B E t h w -> (B t) E h w"))
        return rearrange(ids, "(B t) (h w) -> B t h w", B=len(frames), h=z.shape[3])

    def decode_video(self, ids: Tensor) -> Tensor:
        """ids [B, t, h, w] -> frames [B, T, 3, H, W], about [-1, 1] and not clamped."""
        self._check_ids(ids, n_axes=4)
        grid = (ids.shape[2], ids.shape[3])
        codes = self.quantize.lookup(rearrange(ids, "B t h w -> (B t) (h w)"), grid)
        codes = rearrange(codes, "(B t) E h w -> B E t h w", B=len(ids))
        latents, styles = self.decoder.split_frames(self.post_quant_conv(codes), codes)
        as_frames = "B C T h w -> (B T) C h w"
        frames = self.decoder.decode_frames(rearrange(latents, as_frames), rearrange(styles, as_frames))
        return rearrange(frames, "(B T) C H W -> B T C H W", B=len(ids))

    # ---- checks

    def _check_frames(self, image: Tensor, *, n_axes: int) -> None:
        stride = self.config.stride
        channels = self.config.channels
        fits = image.ndim == n_axes and image.shape[-3] == channels and min(image.shape[-2:]) >= stride
        if not fits or image.shape[-2] % stride or image.shape[-1] % stride:
            axes = f"[B, {channels}, H, W]" if n_axes == 4 else f"[B, T, {channels}, H, W]"
            raise ValueError(
                f"got shape {list(image.shape)}, expected {axes} with sides that are multiples of {stride}: resize or "
                "crop it first"
            )

    def _check_ids(self, ids: Tensor, *, n_axes: int) -> None:
        if ids.ndim != n_axes or ids.is_floating_point() or not ids.numel():
            axes = "[B, h, w]" if n_axes == 3 else "[B, t, h, w]"
            raise ValueError(f"got ids {list(ids.shape)} of {ids.dtype}: expected whole numbers {axes}")
        if not ids.is_meta and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.n_codes:
            raise ValueError(
                f"got ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {self.config.n_codes - 1}, the "
                "codes of this codebook: are they ids of the language model's vocabulary?"
            )
