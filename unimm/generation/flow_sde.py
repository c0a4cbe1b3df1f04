"""Steps along rectified flow that draw noise, and the density of what they drew: sampling as a policy, for rewards.

A step estimates data and noise from the velocity and mixes them anew for the next timestep, a part of the noise drawn
afresh. The mixture keeps the coefficients that the next timestep has on the path, so images stay clean: Wang and Yu
2025, arXiv 2509.05952 (coefficients-preserving sampling), for Flow-GRPO (Liu et al. 2025, arXiv 2505.05470).

Axes: N rows of images, C channels. Timestep 0 is data, 1 is noise; velocity = noise - data.
"""

from math import cos, log, pi, sin

from torch import Tensor


def flow_sde_mean(
    x: Tensor, velocity: Tensor, timestep: float, next_timestep: float, *, noise_level: float
) -> tuple[Tensor, float]:
    """The mean [N, C] and the standard deviation of x at the next timestep.

    mean = (1 - t') (x - t v) + t' cos(a) (x + (1 - t) v), deviation = t' sin(a), a = noise_level pi / 2. A noise_level
    of 0 is Euler's step, 1 draws all of the noise anew.
    """
    data = x - timestep * velocity
    noise = x + (1 - timestep) * velocity
    angle = noise_level * pi / 2
    mean = (1 - next_timestep) * data + next_timestep * cos(angle) * noise
    return mean, next_timestep * sin(angle)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """The log density of every element of x [N, C] under a normal distribution of this mean and deviation."""
    return -(((x - mean) / std).square()) / 2 - log(std) - log(2 * pi) / 2
