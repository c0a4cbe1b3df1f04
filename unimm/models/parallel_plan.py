"""Which modules of a model lie in shards of their own when it is trained on many devices."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from unimm.checkpoint.keymap import matches


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Names of modules, with `{}` for a number.

    Every forward of the model runs each of them equally often, whatever its batch holds: a rank that did not would not
    answer the others. The rest of the model is gathered for a whole step.
    """

    # blocks, whose activations may be computed again for the backward
    blocks: tuple[str, ...]
    # parts of blocks that run before the blocks do
    ahead_of_blocks: tuple[str, ...] = ()


def find_modules(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of these names, by their names."""
    return {name: one for name, one in model.named_modules() if any(matches(pattern, name) for pattern in patterns)}
