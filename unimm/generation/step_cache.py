"""Step caches: at most steps of denoising the blocks are not run, and their output is made from earlier steps.

A cache knows branches, not models: a branch is an image under one of the contexts of its guidance, with a state of its
own. Before a step it says of which branches the blocks have to run; afterwards it gives the output of all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import factorial, inf
from typing import Any, Protocol

import torch
from torch import Tensor

from unimm.generation.guidance import Branch
from unimm.generation.numbers import MOST, parse_flag, parse_float, parse_int


class StepCache(Protocol):
    """The state of one run. inputs: what goes into the first block, outputs: what comes out of the last, by branch."""

    def due(self, branches: Sequence[Branch], inputs: Mapping[Branch, Tensor]) -> list[Branch]:
        """The branches whose blocks have to run at this step."""

    def update(
        self, branches: Sequence[Branch], inputs: Mapping[Branch, Tensor], computed: Mapping[Branch, Tensor]
    ) -> dict[Branch, Tensor]:
        """The outputs of all branches of this step, from those computed for the ones that were due; then on to the
        next."""


@dataclass(frozen=True, kw_only=True)
class TaylorSeer:
    """Outputs are extrapolated from their finite differences (arXiv 2503.06923, equation 7).

    Each branch counts its own steps: its blocks run at the first `warmup` steps, then at every `interval`-th; in between
    the output is the series F_0 + F_1 d + F_2 d^2 / 2 ... up to `order`, d steps after the last run.
    """

    warmup: int = 5
    interval: int = 3
    order: int = 6

    def __post_init__(self) -> None:
        for name, low in (("warmup", 1), ("interval", 1), ("order", 0)):
            object.__setattr__(self, name, parse_int(getattr(self, name), name, low=low, high=MOST))

    def start(self) -> StepCache:
        """The state of one run."""
        return TaylorSeerState(self)


@dataclass(frozen=True, kw_only=True)
class TeaCache:
    """What the blocks added to their input is added again while the input has moved little (arXiv 2411.19108).

    The relative change of the input from step to step, |x' - x| / |x| in the 1-norm, is summed up since the blocks ran
    last; from `threshold` on they run. The paper takes the input that the time has modulated, and fits a polynomial of
    its change to each model; here it is the input as it is, which is the noised image's alone, so that all branches of
    an image run at the same steps. The blocks run at the first `warmup` steps.
    """

    threshold: float = 0.15
    warmup: int = 1

    def __post_init__(self) -> None:
        threshold = parse_float(self.threshold, "threshold", "a number of 0 or more", low=0)
        object.__setattr__(self, "threshold", threshold)
        object.__setattr__(self, "warmup", parse_int(self.warmup, "warmup", low=1, high=MOST))

    def start(self) -> StepCache:
        """The state of one run."""
        return TeaCacheState(self)


StepCacheOptions = TaylorSeer | TeaCache


def parse_step_cache(given: Any) -> StepCacheOptions | None:
    """The cache of a call: True is TaylorSeer as it is by default, False none. Raises ValueError for anything else."""
    if isinstance(given, StepCacheOptions):
        return given
    try:
        return TaylorSeer() if parse_flag(given, "step_cache") else None
    except ValueError as error:
        raise ValueError(f"{error}, or a TaylorSeer or TeaCache of unimm.generation.step_cache") from error


class TaylorSeerState:
    """The finite differences of each branch's outputs."""

    def __init__(self, options: TaylorSeer):
        self.options = options
        self.n_steps: dict[Branch, int] = {}
        self.last_computed: dict[Branch, int] = {}  # the step of the last run
        self.series: dict[Branch, list[Tensor]] = {}

    def due(self, branches: Sequence[Branch], inputs: Mapping[Branch, Tensor]) -> list[Branch]:
        """By their steps alone."""
        return [branch for branch in branches if self._is_due(branch, self.n_steps.get(branch, 0))]

    def _is_due(self, branch: Branch, step: int) -> bool:
        return step < self.options.warmup or step - self.last_computed[branch] >= self.options.interval

    def update(
        self, branches: Sequence[Branch], inputs: Mapping[Branch, Tensor], computed: Mapping[Branch, Tensor]
    ) -> dict[Branch, Tensor]:
        """The outputs of all branches."""
        outputs = {}
        for branch in branches:
            step = self.n_steps.get(branch, 0)
            if branch in computed:
                self._store(branch, computed[branch], step)
            outputs[branch] = self._extrapolate(branch, step - self.last_computed[branch])
            self.n_steps[branch] = step + 1
        return outputs

    def _store(self, branch: Branch, computed: Tensor, step: int) -> None:
        """F_0 = computed, F_i+1 = (F_i - old F_i) / steps since; the orders grow only once the run has settled (step >
        3).
        """
        old = self.series.get(branch, [])
        series = [computed]
        for i in range(min(self.options.order, len(old)) if step > 3 else 0):
            series.append((series[i] - old[i]) / (step - self.last_computed[branch]))
        self.series[branch] = series
        self.last_computed[branch] = step

    def _extrapolate(self, branch: Branch, distance: int) -> Tensor:
        terms = [f * (distance**i / factorial(i)) for i, f in enumerate(self.series[branch])]
        return torch.stack(terms).sum(0) if distance else self.series[branch][0]


class TeaCacheState:
    """Of each branch its last input, how far inputs have moved since its blocks ran, and what these added."""

    def __init__(self, options: TeaCache):
        self.options = options
        self.n_steps: dict[Branch, int] = {}
        self.last_input: dict[Branch, Tensor] = {}
        self.moved: dict[Branch, float] = {}
        self.residual: dict[Branch, Tensor] = {}

    def due(self, branches: Sequence[Branch], inputs: Mapping[Branch, Tensor]) -> list[Branch]:
        """By how far their inputs have moved: one wait for the device a step."""
        known = [branch for branch in branches if branch in self.last_input]
        if known:
            changes = torch.stack([_relative_change(inputs[one], self.last_input[one]) for one in known]).tolist()
            for branch, change in zip(known, changes, strict=True):
                self.moved[branch] += change
        due = [branch for branch in branches if self._is_due(branch)]
        self.moved |= dict.fromkeys(due, 0.0)
        return due

    def _is_due(self, branch: Branch) -> bool:
        is_warm = self.n_steps.get(branch, 0) >= self.options.warmup
        return not is_warm or self.moved.get(branch, inf) >= self.options.threshold

    def update(
        self, branches: Sequence[Branch], inputs: Mapping[Branch, Tensor], computed: Mapping[Branch, Tensor]
    ) -> dict[Branch, Tensor]:
        """The outputs of all branches."""
        self.residual |= {branch: output - inputs[branch] for branch, output in computed.items()}
        self.last_input |= {branch: inputs[branch] for branch in branches}
        self.n_steps |= {branch: self.n_steps.get(branch, 0) + 1 for branch in branches}
        reused = {branch: inputs[branch] + self.residual[branch] for branch in branches if branch not in computed}
        return {branch: computed[branch] if branch in computed else reused[branch] for branch in branches}


def _relative_change(x: Tensor, before: Tensor) -> Tensor:
    """|x - before| / |before| in the 1-norm, float32."""
    return (x.float() - before.float()).abs().mean() / before.float().abs().mean()


class RowStepCache:
    """A step cache over batches whose rows each belong to a branch."""

    def __init__(self, options: StepCacheOptions, owners: Sequence[Branch]):
        """owners: the branch of each row."""
        self.cache = options.start()
        self.owners = list(owners)

    def run(self, inputs: Tensor, compute: Callable[[list[int]], Tensor]) -> Tensor:
        """The blocks' outputs of all rows [B, ...], of which `compute` makes those of the rows that are due."""
        by_branch = dict(zip(self.owners, inputs, strict=True))
        due = set(self.cache.due(self.owners, by_branch))
        rows = [i for i, branch in enumerate(self.owners) if branch in due]
        computed: dict[Branch, Tensor] = {}
        if rows:
            computed = dict(zip((self.owners[i] for i in rows), compute(rows), strict=True))
        outputs = self.cache.update(self.owners, by_branch, computed)
        return torch.stack([outputs[branch] for branch in self.owners])


def row_step_cache(options: StepCacheOptions | None, owners: Sequence[Branch]) -> RowStepCache | None:
    """A cache over rows of these branches, or None for none."""
    return None if options is None else RowStepCache(options, owners)
