"""Classifier-free guidance over a batch in which only some images are guided.

Axes: P images, B branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CFGBranches:
    """The branches of a forward: one under its prompt for each image, then an unconditional one for each guided."""

    n_images: int
    guided: tuple[int, ...]  # the images whose scale is not 1
    scales: Tensor  # of the guided images, float32
    images: Tensor  # [B], the image of each branch

    @classmethod
    def plan(cls, guidance: Sequence[float], device: torch.device) -> "CFGBranches":
        """The branches under one scale for each image; a scale of 1 is no guidance and has no second branch."""
        guided = tuple(i for i, scale in enumerate(guidance) if scale != 1)
        scales = torch.tensor([guidance[i] for i in guided], dtype=torch.float32, device=device)
        images = torch.tensor([*range(len(guidance)), *guided], dtype=torch.long, device=device)
        return cls(len(guidance), guided, scales, images)

    def combine(self, outputs: Tensor) -> Tensor:
        """Outputs of the branches [B, ...] float32 -> those of the images [P, ...], u + scale (c - u) where guided.

        c: under the prompt; u: unconditional. arXiv 2207.12598, equation 6, with scale = 1 + w.
        """
        conditional, unconditional = outputs.split([self.n_images, len(self.guided)])
        if not self.guided:
            return conditional
        guided = self.images[self.n_images :]
        scales = self.scales.view(-1, *[1] * (outputs.ndim - 1))
        combined = unconditional + scales * (conditional[guided] - unconditional)
        return conditional.index_copy(0, guided, combined)
