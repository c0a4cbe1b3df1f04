"""A running average of the weights: what is sampled from and released."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def ramp(updates: int, most: float) -> float:
    """The decay after n updates by UniWorld's published schedule: the first copies, then (1 + n) / (10 + n), at most `most`."""
    return min(most, (1 + updates) / (10 + updates)) if updates else 0.0


class Average:
    """Exponential average, in float32, of the parameters that are trained."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().float().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average <- d * average + (1 - d) * weight, with d = ramp(n, decay) after n updates: the start is forgotten."""
        decay = ramp(self.updates, self.decay)
        live = [p.detach().float() for p in self.live.values()]
        torch._foreach_lerp_(list(self.weights.values()), live, 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model carries the average; afterwards its own weights again, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self.live.items()}
        self.write(self.weights)
        try:
            yield
        finally:
            self.write(kept)

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor]) -> None:
        for name, p in self.live.items():
            p.copy_(weights[name])
