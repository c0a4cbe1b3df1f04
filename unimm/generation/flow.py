"""Rectified flow: path, schedules, the samplers, and what wraps their velocity (guidance, TaylorSeer).

Time 0 is data, 1 is noise; velocity = noise - data. (Liu et al. 2022, arXiv 2209.03003, with the ends named this way.)
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, expm1, factorial, inf, log
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from unimm.kernels.cfg_combine import RENORMS, guided

Velocity = Callable[[Tensor, float], Tensor]  # (x [N, C] packed, time) -> [N, C]
Branch = tuple[int, str]  # a sample of the batch, and the context that it is seen under: "main", "text" or "image"
Features = Callable[[Tensor, float, Sequence[Branch]], list[Tensor]]  # one hidden state a branch, all in one forward


def shift_time(times: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): more of the steps near the noise, for larger pictures. arXiv 2403.03206, section 5.3.2."""
    return shift * times / (1 + (shift - 1) * times)


def knots(steps: int, shift: float) -> Tensor:
    """The times of `steps` steps from noise to data, [steps + 1] float32 from 1 to 0. Raises ValueError below 1 step."""
    _check_knots(steps, shift)
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float32), shift)


def dynamic_shift(tokens: int, *, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)) -> float:
    """The shift of FLUX for a picture of so many tokens: its logarithm is linear in them, through (tokens, value) twice.

    `knots(steps, dynamic_shift(tokens))` are then FLUX's times: e^m / (e^m + 1/t - 1) is shift_time(t, e^m).
    """
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return exp(low[1] + slope * (tokens - low[0]))


def solver_knots(steps: int, *, shift: float = 3.0, trained: int = 1000) -> Tensor:
    """The times of Sana's DPM-Solver++, [steps + 1] float64 to 0, from a little below 1: (trained - 1) / trained, shifted.

    In float64 since `in_whole_steps` cuts them: with a shift of 1 some lie on the cut. Raises ValueError as `knots` does.
    """
    _check_knots(steps, shift)
    data = 1 + torch.arange(steps + 1, dtype=torch.float64) * ((1 / trained - 1) / steps)
    data[-1] = 1 / trained  # to the bit: the first time may lie on a cut
    times = shift_time(1 - data, shift).flip(0)
    times[-1] = 0
    return times


def reshifted_knots(steps: int, shift: float, *, trained: int = 1000) -> Tensor:
    """The times that diffusers' flow Euler takes unless told its sigmas, [steps + 1] float64 to 0: shifted twice.

    A slip of that library (its issue 13243: the end at 1 / trained is shifted already), here to reproduce pictures;
    `knots` is what is meant.
    """
    _check_knots(steps, shift)
    last = shift_time(torch.tensor(1 / trained, dtype=torch.float64), shift).item()
    return torch.cat((shift_time(torch.linspace(1, last, steps, dtype=torch.float64), shift), torch.zeros(1)))


def _check_knots(steps: int, shift: float) -> None:
    if steps < 1:
        raise ValueError(f"got steps {steps}: expected at least 1")
    if not 0 < shift < inf:
        raise ValueError(f"got shift {shift}: expected a positive number (1 is none)")


def whole_times(uniform: Tensor, *, trained: int = 1000) -> Tensor:
    """Draws in [0, 1) to the times that MetaQuery trains at: whole steps of `trained`, (trained - i) / trained, never 0."""
    return (trained - (uniform * trained).floor()) / trained


def in_whole_steps(velocity: Velocity, *, trained: int = 1000) -> Velocity:
    """A velocity that is told times cut down to whole steps of `trained`, as by a scheduler whose timesteps are integers."""

    def cut(x: Tensor, time: float) -> Tensor:
        return velocity(x, int(trained * time) / trained)

    return cut


def add_noise(x: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """The straight path (1 - t) x + t noise, x and noise [N, C], times [N]."""
    t = times[:, None].to(x.dtype)
    return (1 - t) * x + t * noise


def sample(velocity: Velocity, noise: Tensor, times: Tensor, *, progress: bool = False) -> Tensor:
    """Euler steps from noise [N, C] at times[0] to data at times[-1]: x -= v(x, t) (t - t')."""
    x = noise
    steps = list(zip(times[:-1].tolist(), times[1:].tolist(), strict=True))
    for t, after in tqdm(steps, "drawing", disable=not progress, leave=False):
        x = x - velocity(x, t).to(x.dtype) * (t - after)
    return x


def sample_dpm(velocity: Velocity, noise: Tensor, times: Tensor, *, progress: bool = False) -> Tensor:
    """DPM-Solver++ of two steps' memory from noise at times[0] to data at times[-1]; Sana's sampler, fewer steps than Euler's.

    With l(t) = log((1 - t) / t), h = l(t') - l(t) and data = x - t v(x, t): x <- t'/t x + (1 - t') (1 - e^-h) d, where d
    is the data, plus half of its change since the last step for that step's length, times h; the first step and the last
    take the data alone. Lu et al. 2022, arXiv 2211.01095, algorithm 2, on the path of rectified flow.
    """
    x, before, reach = noise, noise, inf
    steps = list(zip(times[:-1].tolist(), times[1:].tolist(), strict=True))
    for t, after in tqdm(steps, "drawing", disable=not progress, leave=False):
        data = x - velocity(x, t).to(x.dtype) * t
        if after == 0:
            x = data
            continue
        h = _log_ratio(after) - _log_ratio(t)
        # before the first step nothing is known: infinitely far away
        mean = data + (0.5 * h / reach) * (data - before) if reach < inf else data
        x = x * (after / t) - mean * ((1 - after) * expm1(-h))
        before, reach = data, h
    return x


def _log_ratio(t: float) -> float:
    return log((1 - t) / t) if t < 1 else -inf


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance under two more contexts: without the last text, and without the images.

    text, image: scales; 1 is none. The image's acts only where text > 1, as in the original.
    interval: guided where low < t <= high, on the shifted time.
    renorm: "global" and "channel" shrink the result to the length of the plain velocity (of the whole picture, or of
    each token), "text_channel" shrinks after the text's part only. renorm_min: the least factor; 1 turns it off.
    """

    text: float = 4.0
    image: float = 1.5
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: Literal["global", "channel", "text_channel"] = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        if self.renorm not in RENORMS:
            raise ValueError(f"unknown renorm {self.renorm!r}: expected {', '.join(RENORMS)}")
        if not (self.text >= 0 and self.image >= 0 and self.interval[0] <= self.interval[1]):
            raise ValueError(
                f"got text {self.text}, image {self.image}, interval {self.interval}: expected scales of 0 or more, low <= high"
            )
        if not 0 <= self.renorm_min <= 1:
            raise ValueError(f"got renorm_min {self.renorm_min}: expected 0 to 1")

    @classmethod
    def of(cls, given: Any, default: "Guidance") -> "Guidance":
        """A guidance as it is, or `default` with another scale of the text. Raises ValueError for anything else."""
        if isinstance(given, cls):
            return given
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise ValueError(f"got guidance {given!r}: expected a Guidance, or the scale of the text")
        return replace(default, text=float(given))

    def branches(self, time: float) -> tuple[str, ...]:
        """The contexts needed at a time."""
        # compared in float32, as the times are: a knot at 0.4 is not above 0.4
        low, high, time = torch.tensor((*self.interval, time), dtype=torch.float32).tolist()
        if not (low < time <= high and self.text > 1):
            return ("main",)
        return ("main", "text", "image") if self.image > 1 else ("main", "text")

    def combine(self, v: Tensor, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """The guided velocity of one picture, all [L, C]; facts/bagel.md section 4.4 (bagel.py:_forward_flow)."""
        if text is None:
            return v
        return guided(v, text, image, text_scale=self.text, image_scale=self.image, renorm=self.renorm, least=self.renorm_min)


def guide(features: Features, head: Callable[[Tensor], Tensor], guidance: Sequence[Guidance]) -> Velocity:
    """A velocity for `sample` from the features of every branch: per sample, its own scales, interval and norm."""

    def velocity(x: Tensor, time: float) -> Tensor:
        branches = [(i, name) for i, g in enumerate(guidance) for name in g.branches(time)]
        found = {branch: head(h) for branch, h in zip(branches, features(x, time, branches), strict=True)}
        combined = [g.combine(*(found[i, name] for name in g.branches(time))) for i, g in enumerate(guidance)]
        return torch.cat(combined)

    return velocity


def share(features: Features, canonical: Callable[[Branch], Branch]) -> Features:
    """Compute branches with equal contexts once: text-to-image then costs two passes under the app's scales, not three."""

    def shared(x: Tensor, time: float, branches: Sequence[Branch]) -> list[Tensor]:
        unique = list(dict.fromkeys(map(canonical, branches)))
        found = dict(zip(unique, features(x, time, unique), strict=True))
        return [found[canonical(branch)] for branch in branches]

    return shared


class TaylorSeer:
    """Skip forwards: extrapolate a branch's features by their finite differences (arXiv 2503.06923, equation 7).

    Each branch counts its own calls: a forward at the first `warm` calls, then at every `every`-th; in between the
    series F_0 + F_1 d + F_2 d^2 / 2 ..., d calls after the last forward. Make a new one for every picture: it holds
    the state of one run and nothing else does.
    """

    def __init__(self, features: Features, *, warm: int = 5, every: int = 3, order: int = 6):
        self.features, self.warm, self.every, self.order = features, warm, every, order
        self.calls: dict[Branch, int] = {}
        self.computed: dict[Branch, int] = {}  # the call of the last forward
        self.series: dict[Branch, list[Tensor]] = {}

    def __call__(self, x: Tensor, time: float, branches: Sequence[Branch]) -> list[Tensor]:
        call = {branch: self.calls.get(branch, 0) for branch in branches}
        due = [b for b in branches if call[b] < self.warm or call[b] - self.computed[b] >= self.every]
        if due:
            for branch, fresh in zip(due, self.features(x, time, due), strict=True):
                self._store(branch, fresh, call[branch])
        self.calls.update({branch: n + 1 for branch, n in call.items()})
        return [self._extrapolate(branch, call[branch] - self.computed[branch]) for branch in branches]

    def _store(self, branch: Branch, fresh: Tensor, call: int) -> None:
        """F_0 = fresh, F_i+1 = (F_i - old F_i) / calls since; orders grow only once the run has settled (call > 3)."""
        old, series = self.series.get(branch, []), [fresh]
        for i in range(min(self.order, len(old)) if call > 3 else 0):
            series.append((series[i] - old[i]) / (call - self.computed[branch]))
        self.series[branch], self.computed[branch] = series, call

    def _extrapolate(self, branch: Branch, distance: int) -> Tensor:
        terms = [f * (distance**i / factorial(i)) for i, f in enumerate(self.series[branch])]
        return torch.stack(terms).sum(0) if distance else self.series[branch][0]
