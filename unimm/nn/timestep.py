"""Embeddings of the timestep."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimestepEmbedder(nn.Module):
    """256 cosines and sines of the raw time in [0, 1] (not times 1000), then Linear, SiLU, Linear."""

    N_FREQUENCIES = 128

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.N_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timesteps: Tensor) -> Tensor:
        """times [N] float32 -> [N, D]."""
        steps = torch.arange(self.N_FREQUENCIES, dtype=torch.float32, device=timesteps.device) / self.N_FREQUENCIES
        angles = timesteps.float()[:, None] * 10000.0**-steps
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1).to(next(self.mlp.parameters()).dtype))


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """times [B] in [0, 1000] -> [B, dim] float32: cosines, then sines, of time * 10000^(-i / (dim/2))."""
    steps = torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device) / (dim // 2)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * steps)
    return torch.cat((angles.cos(), angles.sin()), -1)


class TimestepMLP(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, dim: int, out_dim: int, *, bias: bool):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, out_dim, bias=bias), nn.Linear(out_dim, out_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C] -> [B, D]"""
        return self.linear_2(F.silu(self.linear_1(x)))
