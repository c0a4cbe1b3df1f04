"""The layers of Emu3's vision tokenizer: 2-D stacks over frames, causal 3-D convolutions over time.

docs/originals/emu3.md, "Vision tokenizer". Axes: B images or videos, N frames of all of them, T frames, C channels,
E features of a code, Z channels of a latent, h w grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.tokenizers.kl import Downsample, KLMiddle, ResnetBlock, SpatialAttention, Upsample, group_norm

# zeros before the first frame, whatever the kernel: a kernel of 4 sees two frames more than one of 2 would need
FRAMES_BEFORE = 2


class CausalConv3d(nn.Module):
    """A convolution whose output at a frame depends on that frame and earlier ones."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        height, width = (size - step for size, step in zip(kernel[1:], stride[1:], strict=True))
        # of an odd number of zeros, one more before than behind; F.pad begins with the last axis
        self.padding = (width - width // 2, width // 2, height - height // 2, height // 2, FRAMES_BEFORE, 0)
        self.conv = nn.Conv3d(width_in, width_out, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, h, w]"""
        return self.conv(F.pad(x, self.padding))


class TemporalDownsample(nn.Module):
    """Half as many frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, (4, 3, 3), (2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, h, w] -> [B, C, T/2, h, w]"""
        return F.silu(self.conv(x))


class TemporalUpsample(nn.Module):
    """Every frame twice, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width)

    def forward(self, x: Tensor, *, first_only: bool = False) -> Tensor:
        """x [B, C, T, h, w] -> [B, C, 2T, h, w]; `first_only`: of one frame the first of its two."""
        return F.silu(self.conv(x if first_only else x.repeat_interleave(2, 2)))


class TemporalResnetBlock(nn.Module):
    """Residual block over time: twice batch norm, swish, causal 3x3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(width)
        self.conv1 = CausalConv3d(width, width)
        self.norm2 = nn.BatchNorm3d(width)
        self.conv2 = CausalConv3d(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, h, w]"""
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


def temporal_stack(width: int, n_blocks: int) -> nn.Sequential:
    """Residual blocks over time."""
    return nn.Sequential(*(TemporalResnetBlock(width) for _ in range(n_blocks)))


# ---- encoder


class Emu3VQEncoderLevel(nn.Module):
    """Blocks, each followed by attention at some levels, then half the size (but for the last level)."""

    def __init__(self, width_in: int, width_out: int, *, n_blocks: int, attends: bool, last: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(width_out if i else width_in, width_out) for i in range(n_blocks))
        self.attn = nn.ModuleList(SpatialAttention(width_out) for _ in range(n_blocks * attends))
        self.last = last
        if not last:
            self.downsample = Downsample(width_out)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, h, w] -> [N, C', h', w']"""
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x if self.last else self.downsample(x)


class Emu3VQEncoder(nn.Module):
    """Frames to latents one by one, then fewer frames."""

    def __init__(
        self,
        channels: int,
        width: int,
        latent_channels: int,
        *,
        widths: Sequence[int],
        n_blocks: int,
        attention_levels: Sequence[int],
        n_halvings: int,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            Emu3VQEncoderLevel(a, b, n_blocks=n_blocks, attends=i in attention_levels, last=i == len(widths) - 1)
            for i, (a, b) in enumerate(zip((width, *widths[:-1]), widths, strict=True))
        )
        self.mid = KLMiddle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)
        self.time_conv = nn.ModuleList(TemporalDownsample(latent_channels) for _ in range(n_halvings))
        self.time_res_stack = temporal_stack(latent_channels, n_blocks)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """frames [N, 3, H, W] -> [N, Z, h, w]"""
        x = self.conv_in(frames)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))

    def merge_frames(self, x: Tensor) -> Tensor:
        """x [B, Z, T, h, w] -> [B, Z, t, h, w]"""
        for conv in self.time_conv:
            x = conv(x)
        return self.time_res_stack(x)


# ---- decoder


class SpatialNorm(nn.Module):
    """A group norm whose scale and shift are made of the code at each place. Zheng et al. 2022, arXiv 2209.09002."""

    def __init__(self, width: int, code_dim: int) -> None:
        super().__init__()
        self.norm_layer = group_norm(width)
        self.conv_y = nn.Conv2d(code_dim, width, 1)
        self.conv_b = nn.Conv2d(code_dim, width, 1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [N, C, h, w], style [N, E, h', w'], resized to the nearest"""
        style = F.interpolate(style, size=x.shape[2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(style) + self.conv_b(style)


class StyledResnetBlock(nn.Module):
    """A residual block with norms of the codes."""

    def __init__(self, width_in: int, width_out: int, code_dim: int) -> None:
        super().__init__()
        self.norm1 = SpatialNorm(width_in, code_dim)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = SpatialNorm(width_out, code_dim)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)
        self.changes_width = width_in != width_out

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [N, C, h, w] -> [N, C', h, w]"""
        y = self.conv1(F.silu(self.norm1(x, style)))
        y = self.conv2(F.silu(self.norm2(y, style)))
        return (self.nin_shortcut(x) if self.changes_width else x) + y


class StyledSpatialAttention(nn.Module):
    """Attention between all positions of a frame, with one head and a norm of the codes."""

    def __init__(self, width: int, code_dim: int) -> None:
        super().__init__()
        self.norm = SpatialNorm(width, code_dim)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [N, C, h, w]"""
        y = self.norm(x, style)
        q, k, v = (rearrange(part(y), "N C h w -> N 1 (h w) C") for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(y, "N 1 (h w) C -> N C h w", h=x.shape[2]))


class Emu3VQDecoderMiddle(nn.Module):
    """Block, attention, block, at the coarsest level."""

    def __init__(self, width: int, code_dim: int) -> None:
        super().__init__()
        self.block_1 = StyledResnetBlock(width, width, code_dim)
        self.attn_1 = StyledSpatialAttention(width, code_dim)
        self.block_2 = StyledResnetBlock(width, width, code_dim)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [N, C, h, w]"""
        return self.block_2(self.attn_1(self.block_1(x, style), style), style)


class Emu3VQDecoderLevel(nn.Module):
    """Blocks, each followed by attention at some levels, then twice the size (but for the finest level)."""

    def __init__(
        self, width_in: int, width_out: int, code_dim: int, *, n_blocks: int, attends: bool, finest: bool
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            StyledResnetBlock(width_out if i else width_in, width_out, code_dim) for i in range(n_blocks)
        )
        self.attn = nn.ModuleList(StyledSpatialAttention(width_out, code_dim) for _ in range(n_blocks * attends))
        self.finest = finest
        if not finest:
            self.upsample = Upsample(width_out)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [N, C, h, w] -> [N, C', h', w']"""
        for i, block in enumerate(self.block):
            x = block(x, style)
            if len(self.attn):
                x = self.attn[i](x, style)
        return x if self.finest else self.upsample(x)


class Emu3VQDecoder(nn.Module):
    """More frames, then latents to pixels one by one. `up.0` is the finest level, and runs last."""

    def __init__(
        self,
        channels: int,
        code_dim: int,
        latent_channels: int,
        *,
        widths: Sequence[int],
        n_blocks: int,
        attention_levels: Sequence[int],
        n_halvings: int,
    ) -> None:
        super().__init__()
        self.time_res_stack = temporal_stack(latent_channels, n_blocks)
        self.time_conv = nn.ModuleList(TemporalUpsample(latent_channels) for _ in range(n_halvings))
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = Emu3VQDecoderMiddle(widths[-1], code_dim)
        self.up = nn.ModuleList(
            Emu3VQDecoderLevel(a, b, code_dim, n_blocks=n_blocks + 1, attends=i in attention_levels, finest=i == 0)
            for i, (a, b) in enumerate(zip((*widths[1:], widths[-1]), widths, strict=True))
        )
        self.norm_out = SpatialNorm(widths[0], code_dim)
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def split_frames(self, latents: Tensor, codes: Tensor, *, first_only: bool = False) -> tuple[Tensor, Tensor]:
        """latents [B, Z, t, h, w], codes [B, E, t, h, w] -> latents and styles of the frames [B, Z, T, h, w].

        Both go through the same layers, E = Z. first_only: of one latent frame (t = 1) the first frame, T = 1.
        """
        x = torch.cat((latents, codes))
        x = self.time_res_stack(x)
        for conv in self.time_conv:
            x = conv(x, first_only=first_only)
        frames, styles = x.chunk(2)
        return frames, styles

    def decode_frames(self, latents: Tensor, styles: Tensor) -> Tensor:
        """latents [N, Z, h, w], styles [N, E, h, w] -> frames [N, 3, H, W]"""
        x = self.mid(self.conv_in(latents), styles)
        for level in reversed(self.up):
            x = level(x, styles)
        return self.conv_out(F.silu(self.norm_out(x, styles)))
