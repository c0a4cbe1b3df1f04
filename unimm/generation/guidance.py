"""Classifier-free guidance over branches of conditions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unimm.generation.flow import Velocity
from unimm.kernels.cfg_combine import RENORMS, guided

Branch = tuple[int, str]  # a sample of the batch, and the context that it is seen under: "main", "text" or "image"
Features = Callable[[Tensor, float, Sequence[Branch]], list[Tensor]]  # one hidden state a branch, all in one forward


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
        """The guided velocity of one picture, all [L, C]; docs/originals/bagel.md, "Guidance"."""
        if text is None:
            return v
        return guided(
            v, text, image, text_scale=self.text, image_scale=self.image, renorm=self.renorm, least=self.renorm_min
        )


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
