"""Muon, for matrices in shards too: an update is a function of the whole matrix, which every rank gathers for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unimm.distributed.sharding import local_tensor, shard_like, whole_tensor, with_local

# of the Newton-Schulz iteration: Jordan et al. 2024, kellerjordan.github.io/posts/muon
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
N_ITERATIONS = 5
SMALLEST_NORM = 1e-7


def orthogonalize(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix [m, n], about: its singular values lie between 0.7 and 1.2.

    In bfloat16, and on a CPU in float32, where it takes a third of the time.
    """
    a, b, c = COEFFICIENTS
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    is_tall = len(x) > x.shape[1]
    if is_tall:
        x = x.T
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(N_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """What torch.optim.Muon with adjust_lr_fn="match_rms_adamw" computes, which has neither shards nor float32.

    The rows of a matrix may lie on several ranks. It holds a momentum of this rank's rows.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient; the ranks gather one after the other."""
        assert closure is None, "the trainer computes gradients itself"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        assert p.grad is not None, "of a parameter that is stepped"
        gradient = local_tensor(p.grad)
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalize(whole_tensor(with_local(p, gradient.lerp(average, group["momentum"]))))
        # so that its root mean square is 0.2 lr, as AdamW's about is: arXiv 2502.16982, section 2.2
        scale = group["lr"] * 0.2 * max(p.shape) ** 0.5
        weight = local_tensor(p.detach())
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(shard_like(update, p), alpha=-scale)
