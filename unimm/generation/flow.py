"""Rectified flow: path, schedules, the samplers, and what wraps their velocity (guidance, TaylorSeer).

Time 0 is data, 1 is noise; velocity = noise - data. (Liu et al. 2022, arXiv 2209.03003, with the ends named this way.)
"""

from collections.abc import Callable
from math import exp, expm1, inf, log

import torch
from torch import Tensor
from tqdm import tqdm

Velocity = Callable[[Tensor, float], Tensor]  # (x [N, C] packed, time) -> [N, C]


def shift_timesteps(timesteps: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): more of the steps near the noise, for larger pictures. arXiv 2403.03206, section 5.3.2."""
    return shift * timesteps / (1 + (shift - 1) * timesteps)


def flow_timesteps(steps: int, shift: float) -> Tensor:
    """The times of `steps` steps from noise to data, [steps + 1] float32 from 1 to 0. Raises ValueError below 1 step."""
    _check_schedule(steps, shift)
    return shift_timesteps(torch.linspace(1, 0, steps + 1, dtype=torch.float32), shift)


def dynamic_shift(tokens: int, *, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)) -> float:
    """The shift of FLUX for a picture of so many tokens: its logarithm is linear in them, through (tokens, value) twice.

    `knots(steps, dynamic_shift(tokens))` are then FLUX's times: e^m / (e^m + 1/t - 1) is shift_time(t, e^m).
    """
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return exp(low[1] + slope * (tokens - low[0]))


def dpm_timesteps(steps: int, *, shift: float = 3.0, train_steps: int = 1000) -> Tensor:
    """The times of Sana's DPM-Solver++, [steps + 1] float64 to 0, from a little below 1: (trained - 1) / trained, shifted.

    In float64 since `in_whole_steps` cuts them: with a shift of 1 some lie on the cut. Raises ValueError as `knots` does.
    """
    _check_schedule(steps, shift)
    data = 1 + torch.arange(steps + 1, dtype=torch.float64) * ((1 / train_steps - 1) / steps)
    data[-1] = 1 / train_steps  # to the bit: the first time may lie on a cut
    timesteps = shift_timesteps(1 - data, shift).flip(0)
    timesteps[-1] = 0
    return timesteps


def reshifted_timesteps(steps: int, shift: float, *, train_steps: int = 1000) -> Tensor:
    """The times that diffusers' flow Euler takes unless told its sigmas, [steps + 1] float64 to 0: shifted twice.

    A slip of that library (its issue 13243: the end at 1 / trained is shifted already), here to reproduce pictures;
    `knots` is what is meant.
    """
    _check_schedule(steps, shift)
    last = shift_timesteps(torch.tensor(1 / train_steps, dtype=torch.float64), shift).item()
    return torch.cat((shift_timesteps(torch.linspace(1, last, steps, dtype=torch.float64), shift), torch.zeros(1)))


def _check_schedule(steps: int, shift: float) -> None:
    if steps < 1:
        raise ValueError(f"got steps {steps}: expected at least 1")
    if not 0 < shift < inf:
        raise ValueError(f"got shift {shift}: expected a positive number (1 is none)")


def integer_timesteps(uniform: Tensor, *, train_steps: int = 1000) -> Tensor:
    """Draws in [0, 1) to the times that MetaQuery trains at: whole steps of `trained`, (trained - i) / trained, never 0."""
    return (train_steps - (uniform * train_steps).floor()) / train_steps


def with_integer_timesteps(velocity: Velocity, *, train_steps: int = 1000) -> Velocity:
    """A velocity that is told times cut down to whole steps of `trained`, as by a scheduler whose timesteps are integers."""

    def rounded(x: Tensor, time: float) -> Tensor:
        return velocity(x, int(train_steps * time) / train_steps)

    return rounded


def add_noise(x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The straight path (1 - t) x + t noise, x and noise [N, C], times [N]."""
    t = timesteps[:, None].to(x.dtype)
    return (1 - t) * x + t * noise


def euler(velocity: Velocity, noise: Tensor, timesteps: Tensor, *, progress: bool = False) -> Tensor:
    """Euler steps from noise [N, C] at times[0] to data at times[-1]: x -= v(x, t) (t - t')."""
    x = noise
    steps = list(zip(timesteps[:-1].tolist(), timesteps[1:].tolist(), strict=True))
    for t, after in tqdm(steps, "drawing", disable=not progress, leave=False):
        x = x - velocity(x, t).to(x.dtype) * (t - after)
    return x


def dpm_solver_pp(velocity: Velocity, noise: Tensor, timesteps: Tensor, *, progress: bool = False) -> Tensor:
    """DPM-Solver++ of two steps' memory from noise at times[0] to data at times[-1]; Sana's sampler, fewer steps than Euler's.

    With l(t) = log((1 - t) / t), h = l(t') - l(t) and data = x - t v(x, t): x <- t'/t x + (1 - t') (1 - e^-h) d, where d
    is the data, plus half of its change since the last step for that step's length, times h; the first step and the last
    take the data alone. Lu et al. 2022, arXiv 2211.01095, algorithm 2, on the path of rectified flow.
    """
    x, last_data, last_h = noise, noise, inf
    steps = list(zip(timesteps[:-1].tolist(), timesteps[1:].tolist(), strict=True))
    for t, after in tqdm(steps, "drawing", disable=not progress, leave=False):
        data = x - velocity(x, t).to(x.dtype) * t
        if after == 0:
            x = data
            continue
        h = _log_ratio(after) - _log_ratio(t)
        # before the first step nothing is known: infinitely far away
        mean = data + (0.5 * h / last_h) * (data - last_data) if last_h < inf else data
        x = x * (after / t) - mean * ((1 - after) * expm1(-h))
        last_data, last_h = data, h
    return x


def _log_ratio(t: float) -> float:
    return log((1 - t) / t) if t < 1 else -inf
