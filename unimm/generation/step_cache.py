"""TaylorSeer: features extrapolated over denoising steps, arXiv 2503.06923."""

from collections.abc import Mapping, Sequence
from math import factorial

import torch
from torch import Tensor

from unimm.generation.guidance import Branch


class TaylorSeer:
    """Skips forwards: a branch's features are extrapolated by their finite differences (arXiv 2503.06923, equation 7).

    Each branch counts its own steps: its features are computed at the first `warmup` steps, then at every
    `interval`-th; in between they are the series F_0 + F_1 d + F_2 d^2 / 2 ..., d steps after the last forward. Make a
    new one for every batch of images: it holds the state of one run.
    """

    def __init__(self, *, warmup: int = 5, interval: int = 3, order: int = 6):
        self.warmup = warmup
        self.interval = interval
        self.order = order
        self.n_steps: dict[Branch, int] = {}
        self.last_computed: dict[Branch, int] = {}  # the step of the last forward
        self.series: dict[Branch, list[Tensor]] = {}

    def due(self, branches: Sequence[Branch]) -> list[Branch]:
        """The branches whose features have to be computed at this step."""
        return [branch for branch in branches if self._is_due(branch, self.n_steps.get(branch, 0))]

    def _is_due(self, branch: Branch, step: int) -> bool:
        return step < self.warmup or step - self.last_computed[branch] >= self.interval

    def update(self, branches: Sequence[Branch], computed: Mapping[Branch, Tensor]) -> dict[Branch, Tensor]:
        """The features of all branches of this step, from those computed for the ones that were due; then on to the
        next.
        """
        features = {}
        for branch in branches:
            step = self.n_steps.get(branch, 0)
            if branch in computed:
                self._store(branch, computed[branch], step)
            features[branch] = self._extrapolate(branch, step - self.last_computed[branch])
            self.n_steps[branch] = step + 1
        return features

    def _store(self, branch: Branch, computed: Tensor, step: int) -> None:
        """F_0 = computed, F_i+1 = (F_i - old F_i) / steps since; the orders grow only once the run has settled (step >
        3).
        """
        old = self.series.get(branch, [])
        series = [computed]
        for i in range(min(self.order, len(old)) if step > 3 else 0):
            series.append((series[i] - old[i]) / (step - self.last_computed[branch]))
        self.series[branch] = series
        self.last_computed[branch] = step

    def _extrapolate(self, branch: Branch, distance: int) -> Tensor:
        terms = [f * (distance**i / factorial(i)) for i, f in enumerate(self.series[branch])]
        return torch.stack(terms).sum(0) if distance else self.series[branch][0]
