"""The section of a recipe that trains an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from unimm.training.fields import AtLeastOne, Decay, Positive, RecipeSection


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(RecipeSection):
    """A recipe's `lora` (unimm.adapters)."""

    rank: AtLeastOne
    # the update is scaled by alpha / rank
    alpha: Positive
    # groups of linears: of BAGEL "und" and "gen", its experts, or parts of them such as "gen.attention"
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    # of what the adapted linears read
    dropout: Decay = 0.0
    # whether the norms of the weights' rows are trained, too
    dora: bool = False
