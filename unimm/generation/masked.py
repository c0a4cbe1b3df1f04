"""Masked image tokens: all places are predicted at once, the least sure ones are masked again, step after step.

MaskGIT, Chang et al. 2022, arXiv 2202.04200, section 3.2, as Show-o decodes (docs/originals/show_o.md, "Text to image").

Axes: P images, n tokens of an image, V vocabulary of image tokens, S steps.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimm.generation.numbers import parse_float

# of sigmoid: where it begins and ends, and the smallest share; the released constants
SIGMOID_START = -3.0
SIGMOID_END = 3.0
MIN_SHARE = 1e-6
POWER = re.compile(r"pow(\d+(?:\.\d+)?)")
SCHEDULES = "cosine, linear, sigmoid, or powX, where X is a number"
# below these, logarithms are taken of the limit
MIN_PROBABILITY = 1e-20


@dataclass(frozen=True, kw_only=True)
class MaskedSampling:
    """Options of masked decoding.

    schedule: of the share of places that are still masked: "cosine", "linear", "sigmoid", "powX". temperature: of the
    noise on the sureness by which places are kept, 0 for none; it falls from step to step. token_temperature: of the
    draws of tokens, 0 takes the likeliest; Show-o's is 1.
    """

    schedule: str = "cosine"
    temperature: float = 1.0
    token_temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str) or not (
            self.schedule in ("cosine", "linear", "sigmoid") or POWER.fullmatch(self.schedule)
        ):
            raise ValueError(f"got schedule {self.schedule!r:.80}: expected {SCHEDULES}")
        for name in ("temperature", "token_temperature"):
            value = parse_float(getattr(self, name), name, "0 or more", low=0)
            object.__setattr__(self, name, value)


def resolve_masked_sampling(given: Any, default: MaskedSampling) -> MaskedSampling:
    """The MaskedSampling of a call, the default one for None. Raises ValueError for anything else."""
    if given is None:
        return default
    if not isinstance(given, MaskedSampling):
        raise ValueError(f"got masked_sampling {given!r:.80}: expected a MaskedSampling")
    return given


def masked_share(schedule: str, progress: Tensor) -> Tensor:
    """The share of places that are masked when so much is done: progress [...] in [0, 1], float32 -> [...]."""
    if schedule == "cosine":
        return torch.cos(progress * math.pi * 0.5)
    if schedule == "sigmoid":
        start, end = (torch.tensor(edge).sigmoid() for edge in (SIGMOID_START, SIGMOID_END))
        now = (progress * (SIGMOID_END - SIGMOID_START) + SIGMOID_START).sigmoid()
        return ((end - now) / (end - start)).clamp(MIN_SHARE, 1.0)
    power = POWER.fullmatch(schedule)
    exponent = float(power[1]) if power else 1.0
    return (1 - progress**exponent).clamp(MIN_SHARE, 1.0)


def n_masked_after(schedule: str, step: int, steps: int, n_tokens: int) -> int:
    """How many of an image's places the schedule masks after a step, from 0 on; it may be below 0 after the last."""
    progress = torch.tensor((step + 1) / steps, dtype=torch.float32)
    return math.floor(float(n_tokens * masked_share(schedule, progress)))


def noise_temperature(temperature: float, step: int, steps: int) -> float:
    """The temperature of the noise at a step, from 0 on: a product over the steps so far, unlike MaskGIT's."""
    for done in range(step + 1):
        temperature *= 1.0 - (done + 1) / steps
    return temperature


class MaskedNoise(NamedTuple):
    """What a step draws: of Exp(1) [P, n, V], None for the likeliest tokens; of U(0, 1) [P, n], None for no noise."""

    exponential: Tensor | None
    uniform: Tensor | None


def draw_masked_noise(
    generators: Sequence[torch.Generator], n_tokens: int, vocab_size: int, sampling: MaskedSampling
) -> MaskedNoise:
    """The noise of a step, drawn on the CPU, each image with its own generator: tokens first, then places."""
    exponential = []
    uniform = []
    for generator in generators:
        if sampling.token_temperature:
            e = torch.empty(n_tokens, vocab_size, dtype=torch.float32, device="cpu")
            exponential.append(e.exponential_(generator=generator))
        if sampling.temperature:
            uniform.append(torch.rand(n_tokens, generator=generator, dtype=torch.float32, device="cpu"))
    return MaskedNoise(torch.stack(exponential) if exponential else None, torch.stack(uniform) if uniform else None)


class MaskedStep(NamedTuple):
    """The state after a step: tokens [P, n] with the least sure places masked again; drawn [P, n], without any masked;
    and the probability of each drawn token [P, n], float32's largest number where it was known."""

    tokens: Tensor
    drawn: Tensor
    probabilities: Tensor


def masked_step(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_token: int,
    step: int,
    steps: int,
    sampling: MaskedSampling,
    noise: MaskedNoise,
) -> MaskedStep:
    """Draw a token at every masked place, keep the surest, mask the others again.

    logits [P, n, V] at the tokens' own places, guided, float32; tokens [P, n], of which some are `mask_token`.
    """
    unknown = tokens == mask_token
    p = logits.softmax(-1)
    drawn = _draw_tokens(logits, p, sampling.token_temperature, noise.exponential)
    drawn = torch.where(unknown, drawn, tokens)
    chosen = p.gather(-1, drawn.clamp(max=logits.shape[-1] - 1)[..., None]).squeeze(-1)
    chosen = torch.where(unknown, chosen, torch.finfo(torch.float32).max)
    sureness = chosen.clamp(min=MIN_PROBABILITY).log()
    if noise.uniform is not None:
        u = noise.uniform.to(sureness.device)
        gumbel = -(-u.clamp(min=MIN_PROBABILITY).log()).clamp(min=MIN_PROBABILITY).log()
        sureness = sureness + noise_temperature(sampling.temperature, step, steps) * gumbel
    # at least one place stays masked, as released, but for the only one of an image: after the last step it is drawn's
    # that counts
    n_tokens = tokens.shape[1]
    n = n_masked_after(sampling.schedule, step, steps, n_tokens)
    n_masked = torch.minimum(unknown.sum(1) - 1, torch.full_like(tokens[:, 0], n)).clamp(min=1, max=n_tokens - 1)
    cut = sureness.sort(1).values.gather(1, n_masked[:, None])
    return MaskedStep(torch.where(sureness < cut, mask_token, drawn), drawn, chosen)


def _draw_tokens(logits: Tensor, p: Tensor, temperature: float, exponential: Tensor | None) -> Tensor:
    """A token a place [P, n]: the largest of p / e, with e exponential, is a sample of p."""
    if exponential is None:
        return logits.argmax(-1)
    if temperature != 1:
        p = (logits / temperature).softmax(-1)
    return (p / exponential.to(p.device)).argmax(-1)
