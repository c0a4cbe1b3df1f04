"""Janus's network: a causal decoder between two encoders and two heads."""
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from unimm.models.janus.config import ProjectorConfig


class Projector(nn.Module):
    """Features of an encoder to rows of the language model."""

    def __init__(self, cfg: ProjectorConfig):
        super().__init__()
        dims = [cfg.dim_in] + [cfg.dim_out] * cfg.depth
        linears = [nn.Linear(a, b) for a, b in pairwise(dims)]
        self.layers = nn.Sequential(*[part for linear in linears for part in (linear, nn.GELU())][:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@dataclass(frozen=True)
class Losses:
    """Cross entropy of every labelled row [n], and of every code that is drawn [m]."""

    text: Tensor
    codes: Tensor
