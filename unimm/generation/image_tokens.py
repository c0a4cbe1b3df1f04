"""Sampling of the image tokens of an autoregressive image. Axes: B sequences, V vocabulary of image tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageTokenSampling:
    """Options of sampling image tokens. temperature: 0 takes the likeliest. top_k, top_p: off unless given."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < inf:
            raise ValueError(f"got temperature {self.temperature}: expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"got top_k {self.top_k}: expected at least 1, or None")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"got top_p {self.top_p}: expected more than 0 and at most 1")


def sample_image_tokens(logits: Tensor, sampling: ImageTokenSampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample a token per row of logits [B, V] -> [B], on their device, each row with its own generator, on the CPU.

    The largest of p / e, with e exponential, is a sample of p: one batched operation, without a copy to the host.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_k is not None or sampling.top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        ordered[:, sampling.top_k or p.shape[1] :] = 0
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p * ordered.sum(-1, keepdim=True)] = 0
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    e = torch.stack(
        [torch.empty(p.shape[1], dtype=torch.float32, device="cpu").exponential_(generator=g) for g in generators]
    )
    return (p / e.to(p.device)).argmax(-1)
