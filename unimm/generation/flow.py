"""Rectified flow: the path between data and noise, schedules of timesteps, and samplers with a timestep for each image.

Timestep 0 is data, 1 is noise; velocity = noise - data (Liu et al. 2022, arXiv 2209.03003, with the ends named this
way). Timesteps of a step are float64 on the CPU, so that differences are rounded once and a choice by them waits for no
device.

Axes: P images, or rows of packed images; S steps; N rows; C channels.
"""

from collections.abc import Callable, Iterator
from math import exp, expm1, inf, log
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unimm.checkpoint.valueless import needed_steps
from unimm.generation.numbers import MOST, parse_float, parse_int

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [P, ...], timesteps [P]) -> [P, ...]


# ---- schedules


def shift_timesteps(timesteps: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): more of the steps near the noise, for larger images. arXiv 2403.03206, section 5.3.2."""
    return shift * timesteps / (1 + (shift - 1) * timesteps)


def flow_timesteps(steps: int, shift: float) -> Tensor:
    """The timesteps of `steps` steps from noise to data, [S + 1] float32 from 1 to 0. Raises ValueError below 1
    step."""
    steps = parse_steps(steps)
    shift = parse_shift(shift)
    return shift_timesteps(torch.linspace(1, 0, steps + 1, dtype=torch.float32), shift)


def dynamic_shift(tokens: int, *, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)) -> float:
    """The shift of FLUX for an image of so many tokens: its logarithm is linear in them, through (tokens, value) twice.

    `flow_timesteps(steps, dynamic_shift(tokens))` are FLUX's timesteps: e^m / (e^m + 1/t - 1) is shift_timesteps(t,
    e^m).
    """
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return exp(low[1] + slope * (tokens - low[0]))


def dpm_timesteps(steps: int, *, shift: float = 3.0, train_steps: int = 1000) -> Tensor:
    """The timesteps of Sana's DPM-Solver++, [S + 1] float64 to 0, from (train_steps - 1) / train_steps, shifted.

    In float64, since `floor_timesteps` rounds them down: with a shift of 1 some lie exactly on a training step. Raises
    ValueError below 1 step.
    """
    steps = parse_steps(steps)
    shift = parse_shift(shift)
    data = 1 + torch.arange(steps + 1, dtype=torch.float64) * ((1 / train_steps - 1) / steps)
    data[-1] = 1 / train_steps  # to the bit: the first timestep may lie on a training step
    timesteps = shift_timesteps(1 - data, shift).flip(0)
    timesteps[-1] = 0
    return timesteps


def reshifted_timesteps(steps: int, shift: float, *, train_steps: int = 1000) -> Tensor:
    """The timesteps of diffusers' flow Euler scheduler without explicit sigmas, [S + 1] float64 to 0: shifted twice.

    A mistake of that library (its issue 13243: the end at 1 / train_steps is shifted already), here to reproduce
    images; `flow_timesteps` is what is meant.
    """
    steps = parse_steps(steps)
    shift = parse_shift(shift)
    last = shift_timesteps(torch.tensor(1 / train_steps, dtype=torch.float64), shift).item()
    return torch.cat((shift_timesteps(torch.linspace(1, last, steps, dtype=torch.float64), shift), torch.zeros(1)))


def parse_steps(value: Any) -> int:
    """The number of a sampler's steps, at least 1."""
    return parse_int(value, "steps", low=1, high=MOST)


def parse_shift(value: Any, name: str = "shift") -> float:
    """The shift of a schedule, which is positive."""
    return parse_float(value, name, "a positive number (1 is none)", low=5e-324)


def integer_timesteps(uniform: Tensor, *, train_steps: int = 1000) -> Tensor:
    """Draws in [0, 1) to timesteps of training, (train_steps - i) / train_steps for integers i: never 0.
    MetaQuery's."""
    return (train_steps - (uniform * train_steps).floor()) / train_steps


def floor_timesteps(timesteps: Tensor, *, train_steps: int = 1000) -> Tensor:
    """Timesteps rounded down to multiples of 1 / train_steps, as by a scheduler whose timesteps are integers."""
    return (train_steps * timesteps.double()).floor() / train_steps


# ---- the path, and steps along it


def add_noise(x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The straight path (1 - t) x + t noise, x and noise [N, C], timesteps [N]."""
    t = timesteps[:, None].to(x.dtype)
    return (1 - t) * x + t * noise


def timestep_pairs(timesteps: Tensor, n_images: int, *, progress: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (timesteps, next_timesteps), [P] float64 each, for every step of images that share one schedule [S + 1]; for
    the first alone where weights have no values."""
    pairs = list(zip(timesteps[:-1].tolist(), timesteps[1:].tolist(), strict=True))
    pairs = pairs[: needed_steps(len(pairs))]
    for pair in tqdm(pairs, "denoising", disable=not progress, leave=False):
        t, next_t = (torch.full((n_images,), value, dtype=torch.float64, device="cpu") for value in pair)
        yield t, next_t


def euler_step(x: Tensor, velocity: Tensor, timesteps: Tensor, next_timesteps: Tensor) -> Tensor:
    """One Euler step of every image, x - v (t - t'): x and velocity [P, ...], timesteps and next_timesteps [P]."""
    return x - _scale(velocity.to(x.dtype), timesteps.double() - next_timesteps.double())


def euler(velocity: Velocity, noise: Tensor, timesteps: Tensor, *, progress: bool = False) -> Tensor:
    """Euler steps of images from noise [P, ...] to data along one schedule [S + 1]."""
    x = noise
    for t, next_t in timestep_pairs(timesteps, len(x), progress=progress):
        x = euler_step(x, velocity(x, t), t, next_t)
    return x


class DPMSolverPP:
    """DPM-Solver++ of second order over images [P, ...]: it keeps each one's last data prediction. Sana's solver.

    With l(t) = log((1 - t) / t), h = l(t') - l(t) and data = x - t v: x <- t'/t x + (1 - t') (1 - e^-h) d, where d is
    the data, plus half of its change since the last step for that step's length, times h; the first step and the last
    take the data alone. Lu et al. 2022, arXiv 2211.01095, algorithm 2, on the path of rectified flow.
    """

    def __init__(self) -> None:
        self.last_data: Tensor | None = None
        self.last_h: list[float] = []

    def step(self, x: Tensor, velocity: Tensor, timesteps: Tensor, next_timesteps: Tensor) -> Tensor:
        """One step of every image: x and velocity [P, ...], timesteps and next_timesteps [P]."""
        data = x - _scale(velocity.to(x.dtype), timesteps.double())
        # before an image's first step nothing is known: its last step lies infinitely far away
        last_h = self.last_h or [inf] * len(x)
        pairs = zip(timesteps.tolist(), next_timesteps.tolist(), last_h, strict=True)
        keep, gain, extrapolation, self.last_h = map(
            list, zip(*(_dpm_coefficients(*one) for one in pairs), strict=True)
        )
        mean = data
        if self.last_data is not None and any(extrapolation):
            mean = data + _scale(data - self.last_data, torch.tensor(extrapolation, dtype=torch.float64))
        self.last_data = data
        kept = _scale(x, torch.tensor(keep, dtype=torch.float64))
        return kept - _scale(mean, torch.tensor(gain, dtype=torch.float64))


def dpm_solver_pp(velocity: Velocity, noise: Tensor, timesteps: Tensor, *, progress: bool = False) -> Tensor:
    """Steps of DPM-Solver++ of images from noise [P, ...] to data along one schedule [S + 1]; fewer do than of
    Euler's."""
    solver = DPMSolverPP()
    x = noise
    for t, next_t in timestep_pairs(timesteps, len(x), progress=progress):
        x = solver.step(x, velocity(x, t), t, next_t)
    return x


def _dpm_coefficients(t: float, next_t: float, last_h: float) -> tuple[float, float, float, float]:
    """Of a step: what x is kept by, what the mean is taken by (negative), what the data is extrapolated by, and h."""
    if next_t == 0:
        return 0.0, -1.0, 0.0, last_h
    h = _log_ratio(next_t) - _log_ratio(t)
    extrapolation = 0.5 * h / last_h if last_h < inf else 0.0
    return next_t / t, (1 - next_t) * expm1(-h), extrapolation, h


def _log_ratio(t: float) -> float:
    return log((1 - t) / t) if t < 1 else -inf


def _scale(x: Tensor, factors: Tensor) -> Tensor:
    """x [P, ...] times a float64 factor for each image [P], which is rounded once, to float32 or x's wider dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x * factors.to(x.device, wide).view(-1, *[1] * (x.ndim - 1))).to(x.dtype)
