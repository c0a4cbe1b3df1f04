"""Classifier-free guidance over branches of conditions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unimm.generation.flow import Velocity
from unimm.kernels.cfg_combine import RENORM_TYPES, cfg_combine

Branch = tuple[
    int, str
]  # a sample of the batch, and the context that it is seen under: "full", "no_text" or "no_image"
BranchFeatures = Callable[
    [Tensor, float, Sequence[Branch]], list[Tensor]
]  # one hidden state a branch, all in one forward


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance under two more contexts: without the last text, and without the images.

    text, image: scales; 1 is none. The image's acts only where text > 1, as in the original.
    interval: guided where low < t <= high, on the shifted time.
    renorm: "global" and "channel" shrink the result to the length of the plain velocity (of the whole picture, or of
    each token), "text_channel" shrinks after the text's part only. renorm_min: the least factor; 1 turns it off.
    """

    text_scale: float = 4.0
    image_scale: float = 1.5
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: Literal["global", "channel", "text_channel"] = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        if self.renorm not in RENORM_TYPES:
            raise ValueError(f"unknown renorm {self.renorm!r}: expected {', '.join(RENORM_TYPES)}")
        if not (self.text_scale >= 0 and self.image_scale >= 0 and self.interval[0] <= self.interval[1]):
            raise ValueError(
                f"got text {self.text_scale}, image {self.image_scale}, interval {self.interval}: expected scales of 0 or more, low <= high"
            )
        if not 0 <= self.renorm_min <= 1:
            raise ValueError(f"got renorm_min {self.renorm_min}: expected 0 to 1")

    @classmethod
    def resolve(cls, given: Any, default: "Guidance") -> "Guidance":
        """A guidance as it is, or `default` with another scale of the text. Raises ValueError for anything else."""
        if isinstance(given, cls):
            return given
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise ValueError(f"got guidance {given!r}: expected a Guidance, or the scale of the text")
        return replace(default, text_scale=float(given))

    @classmethod
    def from_json(cls, files: Mapping[str, Any]) -> "Guidance":
        """From the mapping of a nano's config.json."""
        scales = {f"{name}_scale": files[name] for name in ("text", "image") if name in files}
        rest = {name: value for name, value in files.items() if name not in ("text", "image")}
        return cls(**{**rest, **scales, "interval": tuple(files["interval"])})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        files = asdict(self)
        return {"text": files.pop("text_scale"), "image": files.pop("image_scale"), **files}

    def branches(self, time: float) -> tuple[str, ...]:
        """The contexts needed at a time."""
        # compared in float32, as the times are: a knot at 0.4 is not above 0.4
        low, high, time = torch.tensor((*self.interval, time), dtype=torch.float32).tolist()
        if not (low < time <= high and self.text_scale > 1):
            return ("full",)
        return ("full", "no_text", "no_image") if self.image_scale > 1 else ("full", "no_text")

    def combine(self, full: Tensor, no_text: Tensor | None = None, no_image: Tensor | None = None) -> Tensor:
        """The guided velocity of one picture, all [L, C]; docs/originals/bagel.md, "Guidance"."""
        if no_text is None:
            return full
        return cfg_combine(
            full,
            no_text,
            no_image,
            text_scale=self.text_scale,
            image_scale=self.image_scale,
            renorm=self.renorm,
            renorm_min=self.renorm_min,
        )


def cfg_velocity(features: BranchFeatures, head: Callable[[Tensor], Tensor], guidance: Sequence[Guidance]) -> Velocity:
    """A velocity for `sample` from the features of every branch: per sample, its own scales, interval and norm."""

    def velocity(x: Tensor, time: float) -> Tensor:
        branches = [(i, name) for i, g in enumerate(guidance) for name in g.branches(time)]
        found = {branch: head(h) for branch, h in zip(branches, features(x, time, branches), strict=True)}
        combined = [g.combine(*(found[i, name] for name in g.branches(time))) for i, g in enumerate(guidance)]
        return torch.cat(combined)

    return velocity


def deduplicate_branches(features: BranchFeatures, canonical: Callable[[Branch], Branch]) -> BranchFeatures:
    """Compute branches with equal contexts once: text-to-image then costs two passes under the app's scales, not three."""

    def shared(x: Tensor, time: float, branches: Sequence[Branch]) -> list[Tensor]:
        unique = list(dict.fromkeys(map(canonical, branches)))
        found = dict(zip(unique, features(x, time, unique), strict=True))
        return [found[canonical(branch)] for branch in branches]

    return shared
