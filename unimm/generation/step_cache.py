"""TaylorSeer: features extrapolated over denoising steps, arXiv 2503.06923."""

from collections.abc import Sequence
from math import factorial

import torch
from torch import Tensor

from unimm.generation.guidance import Branch, BranchFeatures


class TaylorSeer:
    """Skip forwards: extrapolate a branch's features by their finite differences (arXiv 2503.06923, equation 7).

    Each branch counts its own calls: a forward at the first `warm` calls, then at every `every`-th; in between the
    series F_0 + F_1 d + F_2 d^2 / 2 ..., d calls after the last forward. Make a new one for every picture: it holds
    the state of one run and nothing else does.
    """

    def __init__(self, features: BranchFeatures, *, warmup: int = 5, interval: int = 3, order: int = 6):
        self.features, self.warmup, self.interval, self.order = features, warmup, interval, order
        self.n_calls: dict[Branch, int] = {}
        self.last_computed: dict[Branch, int] = {}  # the call of the last forward
        self.series: dict[Branch, list[Tensor]] = {}

    def __call__(self, x: Tensor, time: float, branches: Sequence[Branch]) -> list[Tensor]:
        call = {branch: self.n_calls.get(branch, 0) for branch in branches}
        due = [b for b in branches if call[b] < self.warmup or call[b] - self.last_computed[b] >= self.interval]
        if due:
            for branch, fresh in zip(due, self.features(x, time, due), strict=True):
                self._store(branch, fresh, call[branch])
        self.n_calls.update({branch: n + 1 for branch, n in call.items()})
        return [self._extrapolate(branch, call[branch] - self.last_computed[branch]) for branch in branches]

    def _store(self, branch: Branch, computed: Tensor, call: int) -> None:
        """F_0 = fresh, F_i+1 = (F_i - old F_i) / calls since; orders grow only once the run has settled (call > 3)."""
        old, series = self.series.get(branch, []), [computed]
        for i in range(min(self.order, len(old)) if call > 3 else 0):
            series.append((series[i] - old[i]) / (call - self.last_computed[branch]))
        self.series[branch], self.last_computed[branch] = series, call

    def _extrapolate(self, branch: Branch, distance: int) -> Tensor:
        terms = [f * (distance**i / factorial(i)) for i, f in enumerate(self.series[branch])]
        return torch.stack(terms).sum(0) if distance else self.series[branch][0]
