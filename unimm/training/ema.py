"""An exponential moving average of the weights: what samples are made with and what is released."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from unimm.checkpoint.save import own_name
from unimm.distributed.sharding import local_tensor


def ramped_decay(n_updates: int, max_decay: float) -> float:
    """Decay of update n, from 0 on, as UniWorld trains: 0 at first, then (1 + n) / (10 + n), at most `max_decay`."""
    return min(max_decay, (1 + n_updates) / (10 + n_updates)) if n_updates else 0.0


class EMA:
    """Exponential moving average, in float32, of the parameters that are trained; of parameters in shards a share a
    rank."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.n_updates = 0
        self.params = {own_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().float().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average <- d * average + (1 - d) * weight, where d rises to the decay: the start is forgotten."""
        average = get_ema_multi_avg_fn(ramped_decay(self.n_updates, self.decay))
        current = [local_tensor(p.detach()).float() for p in self.params.values()]
        average([local_tensor(x) for x in self.weights.values()], current, self.n_updates)
        self.n_updates += 1

    @contextmanager
    def swap_in(self) -> Iterator[None]:
        """Give the model the averaged weights inside the body, and its own, bit for bit, after it."""
        kept = {name: local_tensor(p.detach()).clone() for name, p in self.params.items()}
        self.copy_to_model(self.weights)
        try:
            yield
        finally:
            self.copy_to_model(kept)

    @torch.no_grad()
    def copy_to_model(self, weights: Mapping[str, Tensor]) -> None:
        """Set the model's trained parameters."""
        for name, p in self.params.items():
            local_tensor(p.detach()).copy_(local_tensor(weights[name]))
