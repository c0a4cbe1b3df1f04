"""Embeddings of timesteps: sinusoids, and the small networks behind them.

Axes: N timesteps, D model.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PERIOD = 10000.0


def timestep_embedding(timesteps: Tensor, dim: int, *, frequencies_by_power: bool = False) -> Tensor:
    """Cosines, then sines, of timestep * 10000^(-i / (dim/2)): timesteps [N] -> [N, dim] float32.

    frequencies_by_power: the frequencies as powers of 10000 and not as exponentials, which differ in the last bit.
    """
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device) / (dim // 2)
    frequencies = MAX_PERIOD**-exponents if frequencies_by_power else torch.exp(-math.log(MAX_PERIOD) * exponents)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


class TimestepEmbedder(nn.Module):
    """BAGEL's: 256 sinusoids of the raw timestep in [0, 1] (not times 1000), then Linear, SiLU, Linear."""

    SINUSOIDS = 256

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.SINUSOIDS, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps [N] float32 -> [N, D]."""
        sinusoids = timestep_embedding(timesteps, self.SINUSOIDS, frequencies_by_power=True)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class TimestepMLP(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, dim: int, out_dim: int, *, bias: bool):
        super().__init__()
        self.linear_1 = nn.Linear(dim, out_dim, bias=bias)
        self.linear_2 = nn.Linear(out_dim, out_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, dim] -> [N, out_dim]."""
        return self.linear_2(F.silu(self.linear_1(x)))
