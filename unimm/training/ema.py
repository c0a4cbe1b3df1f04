"""A running average of the weights: what is sampled from and released."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def ramped_decay(n_updates: int, max_decay: float) -> float:
    """The decay after n updates by UniWorld's published schedule: the first copies, then (1 + n) / (10 + n), at most `most`."""
    return min(max_decay, (1 + n_updates) / (10 + n_updates)) if n_updates else 0.0


class EMA:
    """Exponential average, in float32, of the parameters that are trained."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.n_updates = 0
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().float().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average <- d * average + (1 - d) * weight, with d = ramp(n, decay) after n updates: the start is forgotten."""
        decay = ramped_decay(self.n_updates, self.decay)
        live = [p.detach().float() for p in self.params.values()]
        torch._foreach_lerp_(list(self.weights.values()), live, 1 - decay)
        self.n_updates += 1

    @contextmanager
    def swap_in(self) -> Iterator[None]:
        """Inside, the model carries the average; afterwards its own weights again, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self.params.items()}
        self.copy_to_model(self.weights)
        try:
            yield
        finally:
            self.copy_to_model(kept)

    @torch.no_grad()
    def copy_to_model(self, weights: Mapping[str, Tensor]) -> None:
        for name, p in self.params.items():
            p.copy_(weights[name])
