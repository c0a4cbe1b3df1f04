"""BAGEL's network: two experts in one decoder, a ViT, a VAE and the flow head."""
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Per token: cross entropy of every labelled row [n], squared error of every noised latent token [m, C]."""

    ce: Tensor
    mse: Tensor
