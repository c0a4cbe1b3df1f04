"""Losses as sums and counts, which add up over micro-batches and ranks: a mean of means would weigh tokens unevenly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossSum:
    """A loss [] summed over `count` of what it is the mean of: tokens, patches, pixels, samples."""

    total: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """The mean loss []."""
        return self.total / self.count

    @classmethod
    def over(cls, losses: Tensor) -> LossSum:
        """The losses of all elements of a tensor."""
        return cls(losses.sum(), losses.numel())

    @classmethod
    def from_mean(cls, mean: Tensor, count: int) -> LossSum:
        """A mean [] over `count` as their sum."""
        return cls(mean * count, count)


def mean_losses(losses: Mapping[str, LossSum]) -> dict[str, Tensor]:
    """The mean [] of every loss."""
    return {name: loss.mean for name, loss in losses.items()}


def count_by_kind(names: Sequence[str], kinds: Tensor) -> dict[str, int]:
    """How many rows are of each kind that occurs. kinds [n]: indices into the names, -1 for none of them."""
    counts = {name: int((kinds == i).sum()) for i, name in enumerate(names)}
    return {name: n for name, n in counts.items() if n}


def sum_by_kind(names: Sequence[str], kinds: Tensor, losses: Tensor) -> dict[str, LossSum]:
    """The losses of every kind that occurs.

    kinds [n]: indices into the names. losses [n], or [n, C]: of the same rows; that of a row is the mean of its C.
    """
    found = count_by_kind(names, kinds)
    rows = losses.flatten(1).mean(1) if losses.ndim > 1 else losses
    return {name: LossSum(rows[kinds == names.index(name)].sum(), n) for name, n in found.items()}
