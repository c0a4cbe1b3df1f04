"""Randomness of a call: generators from seeds, and the noise that images begin from, the same on every device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A random generator of each seed, on the CPU, so that an image does not depend on the device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def gaussian_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal noise of a shape, drawn in float32 on the CPU whatever torch's defaults are."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
