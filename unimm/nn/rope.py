"""Rotary position embeddings (RoFormer, arXiv 2104.09864): of Llama's pairs, of several axes, and as complex numbers.

Axes: N packed tokens, B batch, J tokens, H heads, K head, A axes of a position.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

ROPE_THETA = 10000.0  # of every model but those whose configs have another


def rope_cos_sin(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Cosines and sines [2, N, K/2] of position * theta^(-2i/K), computed in float32. position_ids [N]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.float()[:, None] * theta**-exponents
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def mrope_cos_sin(
    position_ids: Tensor, head_dim: int, theta: float, sections: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Cosines and sines [2, N, K/2] of positions of several axes [N, A]: each axis has the frequencies of its section.

    M-RoPE, arXiv 2409.12191, section 2.1. Positions [N], or equal on all axes, give `rope_cos_sin`.
    """
    if position_ids.ndim == 1:
        return rope_cos_sin(position_ids, head_dim, theta, dtype)
    axes = [rope_cos_sin(axis, head_dim, theta, dtype).split(list(sections), -1) for axis in position_ids.unbind(1)]
    return torch.cat([frequencies[i] for i, frequencies in enumerate(axes)], -1)


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K/2) of x [N, H, K] by cos_sin [2, N, K/2]: the half-split pairing of Llama and Qwen."""
    cos, sin = rearrange(cos_sin, "two n k -> two n 1 k")
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def complex_rope(
    position_ids: Tensor, axes_dims: Sequence[int], *, dtype: torch.dtype, theta: float = ROPE_THETA
) -> Tensor:
    """Rotations [J, K/2] complex64 of positions [J, A]: axis a rotates axes_dims[a] / 2 pairs by
    theta^(-2i/axes_dims[a]).

    dtype: of the angles, as the original has them; float32 differs from float64 where positions are in the thousands.
    Raises ValueError for another number of axes.
    """
    if position_ids.ndim != 2 or position_ids.shape[1] != len(axes_dims):
        raise ValueError(
            f"got position ids of shape {list(position_ids.shape)}: expected [J, {len(axes_dims)}], one number an axis"
        )
    frequencies = [theta ** -(torch.arange(0, n, 2, dtype=torch.float32).to(dtype) / n) for n in axes_dims]
    # on the CPU: not every device has sines of float64, and the tables are small
    positions = position_ids.to("cpu", dtype)
    angles = torch.cat([positions[:, axis, None] * frequency for axis, frequency in enumerate(frequencies)], -1)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(position_ids.device)


def apply_complex_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x [B, J, H, K] by rotations [J, K/2] complex."""
    pairs = rearrange(x.float(), "B J H (K two) -> B J H K two", two=2)
    rotations = rotations[:, None]
    if torch.compiler.is_compiling():
        # compilers fuse real numbers and not complex ones; uncompiled, on a CPU, real ones are ten times as slow
        a, b = pairs.unbind(-1)
        rotated = torch.stack((a * rotations.real - b * rotations.imag, a * rotations.imag + b * rotations.real), -1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * rotations)
    return rearrange(rotated, "B J H K two -> B J H (K two)").to(x.dtype)
