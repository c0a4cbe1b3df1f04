"""Rotary position embeddings."""

import torch
from einops import rearrange
from torch import Tensor


def rope_cos_sin(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Rotary angles as [2, N, K/2] (cos, sin): position * theta^(-2i/K), computed in float32. RoFormer, arXiv 2104.09864."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * theta**-steps
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of x [N, H, K] by `angles` [2, N, K/2]: the half-split pairing of Llama and Qwen."""
    cos, sin = rearrange(cos_sin, "two n k -> two n 1 k")
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
