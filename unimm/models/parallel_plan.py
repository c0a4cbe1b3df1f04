"""A model on many devices: which modules lie in shards of their own in training, and how linears are shared where all
compute one forward pass together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, kw_only=True)
class LinearSplit:
    """How the devices of tensor parallel inference share a linear.

    kind: "column", of whose outputs each device has its part; "row", which takes such parts and adds up over devices;
    "gathered", a column whose outputs all devices get. The outputs of a column, or the inputs of a row, may be several
    things beside each other, of each of which a device has its part: `equal` of one size, or `wide` as wide as the
    model, and behind them the rest.
    """

    kind: Literal["column", "row", "gathered"]
    equal: int = 1
    wide: int = 0


COLUMN = LinearSplit(kind="column")
ROW = LinearSplit(kind="row")
GATHERED = LinearSplit(kind="gathered")

# names of linears, with `{}` for a number or a name
TensorParallelPlan = Mapping[str, LinearSplit]


def decoder_tensor_plan(decoder: str) -> TensorParallelPlan:
    """The plan of a decoder's blocks, whatever its experts: heads and the feed-forward's hidden units lie apart."""
    expert = f"{decoder}.blocks.{{}}.experts.{{}}."
    columns = ("q", "k", "v", "mlp.gate", "mlp.up")
    return {
        **{expert + name: COLUMN for name in columns},
        **{expert + name: ROW for name in ("out_proj", "mlp.down")},
        f"{decoder}.head": GATHERED,
    }
