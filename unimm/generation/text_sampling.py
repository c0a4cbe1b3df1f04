"""Sampling of text tokens. Axes: B sequences, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unimm.generation.numbers import parse_float, parse_int

DEFAULT_MAX_TOKENS = 512  # new ids of a text, where neither the call nor the config sets a limit

# of a temperature or a mass: below, float32 rounds it, or what is divided by it, to nothing or to infinity
LEAST = 1e-30


@dataclass(frozen=True, kw_only=True)
class TextSampling:
    """Options of text decoding. temperature: 0 is greedy. top_p: keep the likeliest ids up to this mass.

    max_tokens: the limit of new ids; unless given, the config's, or else 512. stop: strings that end the text and are
    no part of it. top_p: Holtzman et al. 2020, arXiv 1904.09751.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", parse_temperature(self.temperature))
        object.__setattr__(self, "top_p", parse_top_p(self.top_p))
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", parse_int(self.max_tokens, "max_tokens", low=1))
        given: Any = self.stop
        stop = (given,) if isinstance(given, str) else given
        if not isinstance(stop, Sequence) or not all(isinstance(one, str) and one for one in stop):
            raise ValueError(f"got stop {self.stop!r}: expected strings of at least one character")
        object.__setattr__(self, "stop", tuple(stop))

    @property
    def token_limit(self) -> int:
        """The limit of new ids."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def with_default_max_tokens(self, max_tokens: int) -> "TextSampling":
        """The same options, with this limit where none is set."""
        return replace(self, max_tokens=max_tokens) if self.max_tokens is None else self


def parse_temperature(value: Any) -> float:
    """A temperature of sampling; 0 is greedy, and so is one by which float32's logits cannot be divided."""
    temperature = parse_float(value, "temperature", "0 (greedy) or more, and finite", low=0)
    return temperature if temperature >= LEAST else 0.0


def parse_top_p(value: Any) -> float:
    """The mass of probability that top-p sampling keeps."""
    top_p = parse_float(value, "top_p", "more than 0 and at most 1", low=5e-324, high=1)
    return max(top_p, LEAST)  # the likeliest id is always kept


def resolve_sampling(given: Any) -> TextSampling:
    """The TextSampling of a call, the default one for None. Raises ValueError for anything else."""
    if given is None:
        return TextSampling()
    if not isinstance(given, TextSampling):
        raise ValueError(
            f"got text_sampling {given!r:.80}: expected a TextSampling, as in TextSampling(temperature=0.7)"
        )
    return given


def sample_token(logits: Tensor, sampling: TextSampling, generators: Sequence[torch.Generator]) -> list[int]:
    """Sample an id per row of logits [B, V], each with its own generator: a row does not depend on the others."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    p = (logits.float().cpu() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    return [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(p, generators, strict=True)]
