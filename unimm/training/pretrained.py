"""Models that a training starts from: a release, with its tokenizer and all its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from unimm.models.base import UnifiedModel
from unimm.training.config import from_mapping
from unimm.training.fields import Dtype, RecipeSection

Model = TypeVar("Model", bound=UnifiedModel)


@dataclass(frozen=True, kw_only=True)
class ReleaseConfig(RecipeSection):
    """A recipe's `model` that is a release."""

    # a bundled name, a folder, or a hub id
    from_pretrained: str
    # of the weights; what is trained should be in float32
    dtype: Dtype = "float32"
    # parts that are taken from elsewhere, by name; null leaves an optional one out
    components: Mapping[str, str | None] | None = None


def load_released(family: type[Model], model: Mapping[str, Any]) -> Model:
    """The model of a recipe's `model`. Raises ValueError where it names no release of the family."""
    config = from_mapping(ReleaseConfig, model, where="model of the recipe")
    return family.from_pretrained(config.from_pretrained, dtype=config.dtype, components=config.components)


def names_release(model: Mapping[str, Any], parts: Mapping[str, str | None]) -> bool:
    """Whether a recipe's `model` is a release, rather than what is built around parts that the options name.

    parts: the folders or hub ids of the parts, by the options' names, None for none. Raises ValueError for both.
    """
    given = [name for name, place in parts.items() if place]
    if "from_pretrained" in model and given:
        raise ValueError(f"got model.from_pretrained, and {', '.join(given)} in the options: expected one of both")
    return "from_pretrained" in model
