"""The sections of a recipe on data: which datasets of one's own, how their samples are packed, what is held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from unimm.training.fields import AtLeastOne, Fraction, NoneOrMore, NotNegative, RecipeSection


@dataclass(frozen=True, kw_only=True)
class DataGroupConfig(RecipeSection):
    """Datasets that are drawn from as one (docs/data.md)."""

    # files and folders
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    # of the format that is named, or recognised
    format: str = ""
    # of the group's share of the samples
    weight: NotNegative = 1.0
    # whether every batch begins with one of its samples, beside its share
    mandatory: bool = False
    # the share of the rows of each path, its last ones, that is left to validation
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # what a column is for -> its name; the folder that names of images are relative to; frames of a video
    columns: Mapping[str, str] | None = None
    images: str = ""
    video_frames: AtLeastOne | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig(RecipeSection):
    """A recipe's `data`: the datasets that it trains on (unimm.training.record_batches)."""

    groups: Annotated[Mapping[str, DataGroupConfig], Field(min_length=1)]
    # a greater share of broken rows ends the run
    max_broken: Fraction = 0.01
    # streams of batches that a rank takes by turns; so many processes, or a divisor of it, can make them
    lanes: AtLeastOne = 8


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(RecipeSection):
    """A recipe's `validation` on a held-out part (unimm.training.validation)."""

    # steps between two validations; there is one at the end, too
    every: AtLeastOne
    # batches as training has them, the same every time
    batches: AtLeastOne
    # which weights are validated: the averaged ones, which a release holds, or those that are trained
    weights: Literal["average", "current"] = "average"
    # datasets of its own, in place of what the groups of `data` hold out
    data: DataConfig | None = None


@dataclass(frozen=True, kw_only=True)
class PackingConfig(RecipeSection):
    """A recipe's `packing` of samples by their tokens (unimm.training.packing); the defaults are BAGEL's."""

    # a pack of so many is done
    expected_tokens: AtLeastOne
    # no pack has more
    max_tokens: AtLeastOne
    # a sample with more is left out
    max_tokens_per_sample: AtLeastOne
    # samples that wait for a pack with room for them
    buffer_size: NoneOrMore = 50
    # a pack with fewer takes samples that wait before new ones
    prefer_buffer_before: AtLeastOne = 16384

    def __post_init__(self) -> None:
        for name in ("expected_tokens", "max_tokens_per_sample"):
            value = getattr(self, name)
            if value > self.max_tokens:
                raise ValueError(f"got {name} {value} and max_tokens {self.max_tokens}: expected no more than that")
