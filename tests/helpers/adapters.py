"""Adapters in tests: moved away from where they begin, and their gradients against differences of the loss."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def move_trained(model: nn.Module, *, seed: int = 0, std: float = 0.05) -> None:
    """Move what is trained away from where it began, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(std * torch.randn(p.shape, generator=generator))


def slope_against_gradient(model: nn.Module, loss: Callable[[], Tensor], *, step: float = 1e-2) -> float:
    """The loss's slope along its own gradient, by differences, over the gradient's norm: 1 where the gradient is whole.

    step: how far to either side, as a part of the gradient's norm of 1.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss(), trained, allow_unused=True)
    norm = torch.stack([g.double().square().sum() for g in grads if g is not None]).sum().sqrt()
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            moves = [None if g is None else sign * step * g / norm for g in grads]
            for p, move in zip(trained, moves, strict=True):
                if move is not None:
                    p.add_(move)
            values.append(loss().double())
            for p, move in zip(trained, moves, strict=True):
                if move is not None:
                    p.sub_(move)
    return float((values[0] - values[1]) / (2 * step) / norm)
