"""Sampling of the image tokens of an autoregressive image. Axes: B sequences, V vocabulary of image tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unimm.generation.numbers import parse_int
from unimm.generation.text_sampling import parse_temperature, parse_top_p


@dataclass(frozen=True, kw_only=True)
class ImageTokenSampling:
    """Options of sampling image tokens. temperature: 0 takes the likeliest. top_k, top_p: off unless given."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", parse_temperature(self.temperature))
        object.__setattr__(self, "top_p", parse_top_p(self.top_p))
        if self.top_k is not None:
            object.__setattr__(self, "top_k", parse_int(self.top_k, "top_k", low=1))


def resolve_image_sampling(given: Any, default: ImageTokenSampling) -> ImageTokenSampling:
    """The ImageTokenSampling of a call, the default one for None. Raises ValueError for anything else."""
    if given is None:
        return default
    if not isinstance(given, ImageTokenSampling):
        raise ValueError(f"got image_sampling {given!r:.80}: expected an ImageTokenSampling")
    return given


def sample_image_tokens(logits: Tensor, sampling: ImageTokenSampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample a token per row of logits [B, V] -> [B], on their device, each row with its own generator, on the CPU.

    The largest of p / e, with e exponential, is a sample of p: one batched operation, without a copy to the host.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_k is not None or sampling.top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        ordered[:, min(sampling.top_k or p.shape[1], p.shape[1]) :] = 0
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p * ordered.sum(-1, keepdim=True)] = 0
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    e = torch.stack(
        [torch.empty(p.shape[1], dtype=torch.float32, device="cpu").exponential_(generator=g) for g in generators]
    )
    return (p / e.to(p.device)).argmax(-1)
