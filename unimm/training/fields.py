"""The base of recipes' sections, and types of their fields: numbers within their bounds, tasks of the shapes world."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field

from unimm.data.shapes import TASKS
from unimm.data.shapes.world import IMAGE_SIZE, check_known


class RecipeSection:
    """A part of a recipe: subclasses are dataclasses that `from_mapping` reads."""

    # no string for a number, no 1.0 or true for 1, no infinities
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


# ---- numbers

AtLeastOne = Annotated[int, Field(ge=1)]
NoneOrMore = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# the decay of a mean of gradients
Decay = Annotated[float, Field(ge=0, lt=1)]
# the upper half of a generator's 63 bits; the step is the lower one
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def held_out_seed(seed: int) -> int:
    """The seed of the batches that a run is validated on: one that no recipe can train on."""
    return 2**31 + seed


# what the width of an autoencoder's levels is multiplied by
Multipliers = Annotated[tuple[AtLeastOne, ...], Field(min_length=1)]
# floating types that weights are released in
Dtype = Literal["float32", "float16", "bfloat16"]


def _check_weights(weights: Mapping[str, float]) -> Mapping[str, float]:
    if weights and not any(weights.values()):
        raise ValueError(f"got {dict(weights)}, expected at least one above 0")
    return weights


# weights of the losses: a negative one would make its loss larger
LossWeights = Annotated[Mapping[str, NotNegative], Field(min_length=1), AfterValidator(_check_weights)]

# ---- the shapes world

# tasks whose target is an image
IMAGE_TASKS = tuple(task for task in TASKS if task.split(".")[0] in ("draw", "edit", "reason"))


def known_tasks(known: Collection[str]) -> AfterValidator:
    """A check that tasks, or the keys of a mapping, are among these."""

    def check(tasks: Any) -> Any:
        for task in tasks:
            check_known("task", task, known)
        return tasks

    return AfterValidator(check)


def check_world_image_size(size: Any) -> int:
    """The side of an image of the shapes world, in pixels, which there is one of."""
    if size != IMAGE_SIZE:
        raise ValueError(f"got {size!r}, expected {IMAGE_SIZE}, the side of every image of the shapes world")
    return IMAGE_SIZE


ImageTasks = Annotated[tuple[str, ...], Field(min_length=1), known_tasks(IMAGE_TASKS)]
# samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
OptionalTaskWeights = Annotated[Mapping[str, NoneOrMore], AfterValidator(_check_weights)]
TaskWeights = Annotated[OptionalTaskWeights, Field(min_length=1)]
WorldImageSize = Annotated[int, AfterValidator(check_world_image_size)]


def grid_side(cell: int, name: str) -> int:
    """The cells along a side of an image of the shapes world. name: of what is `cell` pixels a side, for the error."""
    if IMAGE_SIZE % cell:
        raise ValueError(
            f"got {name} {cell} in the recipe's model, expected a divisor of the images' {IMAGE_SIZE} pixels"
        )
    return IMAGE_SIZE // cell
