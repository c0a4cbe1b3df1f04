"""Classifier-free guidance over the contexts of a prompt and its images; every image has its own scales and its own
timestep.

Axes: P images, N rows of all images, L rows of one image, C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unimm.checkpoint.config_io import JsonConfig, JsonLayout
from unimm.generation.numbers import parse_float, to_python
from unimm.kernels.cfg_combine import RENORM_TYPES, cfg_combine

Branch = tuple[int, str]  # (image of the batch, its context): "full", "no_text" or "no_image"


@dataclass(frozen=True, kw_only=True)
class Guidance(JsonConfig):
    """Classifier-free guidance against two more contexts: without the last text, and without the images.

    text_scale, image_scale: 1 is none. The image's acts only where text_scale > 1, as in the original.
    interval: guided where low < t <= high, on the shifted timestep.
    renorm: "global" and "channel" shrink the result to the length of the unguided velocity (of the whole image, or of
    each token), "text_channel" shrinks after the text's part only. renorm_min: the least factor; 1 turns it off.
    """

    text_scale: float = 4.0
    image_scale: float = 1.5
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: Literal["global", "channel", "text_channel"] = "global"
    renorm_min: float = 0.0

    # of a bundled model's config.json
    JSON: ClassVar = JsonLayout(
        keys={
            "text_scale": "text",
            "image_scale": "image",
            "interval": "interval",
            "renorm": "renorm",
            "renorm_min": "renorm_min",
        },
    )

    def __post_init__(self) -> None:
        if self.renorm not in RENORM_TYPES:
            raise ValueError(f"unknown renorm {self.renorm!r}: expected {', '.join(RENORM_TYPES)}")
        for name in ("text_scale", "image_scale"):
            object.__setattr__(self, name, parse_float(getattr(self, name), name, "a scale of 0 or more", low=0))
        object.__setattr__(self, "renorm_min", parse_float(self.renorm_min, "renorm_min", "0 to 1", low=0, high=1))
        object.__setattr__(self, "interval", _parse_interval(self.interval))

    def branches(self, timestep: float) -> tuple[str, ...]:
        """The contexts needed at a timestep."""
        # compared in float32, as the schedule is: a timestep at 0.4 is not above 0.4
        low, high, t = torch.tensor((*self.interval, timestep), dtype=torch.float32).tolist()
        if not (low < t <= high and self.text_scale > 1):
            return ("full",)
        return ("full", "no_text", "no_image") if self.image_scale > 1 else ("full", "no_text")

    def combine(self, full: Tensor, no_text: Tensor | None = None, no_image: Tensor | None = None) -> Tensor:
        """The guided velocity of one image from that under each context, all [L, C] (released code:
        bagel.py:_forward_flow).
        """
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


def resolve_guidance(given: Any, default: Guidance) -> Guidance:
    """A Guidance as it is, or `default` with another text_scale for a number. Raises ValueError for anything else."""
    parsed = parse_guidance(given)
    return parsed if isinstance(parsed, Guidance) else replace(default, text_scale=parsed)


def parse_guidance(given: Any) -> Guidance | float:
    """A Guidance as it is, or the scale of the text. Raises ValueError for anything else."""
    if isinstance(given, Guidance):
        return given
    return parse_float(given, "guidance", "a Guidance, or the scale of the text, 0 or more", low=0)


def _parse_interval(given: Any) -> tuple[float, float]:
    ends = to_python(given)
    if not isinstance(ends, Sequence) or isinstance(ends, str) or len(ends) != 2:
        raise ValueError(f"got interval {given!r:.80}: expected two timesteps, low <= high")
    low, high = (parse_float(end, "interval", "two timesteps, low <= high") for end in ends)
    if low > high:
        raise ValueError(f"got interval {given!r:.80}: expected two timesteps, low <= high")
    return low, high


def guidance_branches(guidance: Sequence[Guidance], timesteps: Tensor) -> list[Branch]:
    """The branches that each image needs at its own timestep [P]."""
    pairs = enumerate(zip(guidance, timesteps.tolist(), strict=True))
    return [(i, name) for i, (one, t) in pairs for name in one.branches(t)]


def cfg_velocity(velocities: Mapping[Branch, Tensor], guidance: Sequence[Guidance], timesteps: Tensor) -> Tensor:
    """The guided velocity of all images, packed [N, C], from that of every branch [L, C], at timesteps [P]."""
    guided = []
    for i, (one, t) in enumerate(zip(guidance, timesteps.tolist(), strict=True)):
        guided.append(one.combine(*(velocities[i, name] for name in one.branches(t))))
    return torch.cat(guided)


def deduplicate_branches(branches: Sequence[Branch], canonical: Callable[[Branch], Branch]) -> list[Branch]:
    """One branch for each set of equal contexts: text to image then costs two forwards under the app's scales, not
    three.
    """
    return list(dict.fromkeys(map(canonical, branches)))
