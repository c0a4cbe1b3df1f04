"""The numbers of a LoRA adapter, and the linears that it adapts.

W + (alpha / rank) B A in place of W, of which A [rank, D] and B [F, rank] are trained: Hu et al. 2021, arXiv 2106.09685,
section 4.1. DoRA trains the norms of the rows, too: Liu et al. 2024, arXiv 2402.09353, section 4.1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from unimm.checkpoint.keymap import matches
from unimm.checkpoint.save import own_name
from unimm.nn.packed_linear import PackedLinear
from unimm.nn.quantized_linear import QuantizedLinear

# groups of linears by name, as patterns of names in key maps: `gen.attention` belongs to `gen`, too
LinearGroups = dict[str, tuple[str, ...]]
ADAPTABLE = (nn.Linear, PackedLinear, QuantizedLinear)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A LoRA adapter: rank, alpha (the update is scaled by alpha / rank), the groups of linears that it adapts, dropout
    of its inputs in training, and whether it is a DoRA."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self) -> None:
        numbers = (int, float)
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"got rank {self.rank!r} of an adapter: expected a whole number of 1 or more")
        if type(self.alpha) not in numbers or not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"got alpha {self.alpha!r} of an adapter: expected a positive number")
        if type(self.dropout) not in numbers or not 0 <= self.dropout < 1:
            raise ValueError(f"got dropout {self.dropout!r} of an adapter: expected a number in [0, 1)")
        if type(self.dora) is not bool:
            raise ValueError(f"got dora {self.dora!r} of an adapter: expected True or False")
        targets: Any = self.targets
        if not isinstance(targets, tuple) or not targets or not all(isinstance(one, str) for one in targets):
            raise ValueError(
                f"got targets {self.targets!r:.80} of an adapter: expected a tuple of names of groups of linears"
            )


def decoder_linears(group: str, expert: str, *, prefix: str = "") -> LinearGroups:
    """The groups GROUP.attention and GROUP.mlp of an expert of a decoder, whose names begin with `prefix`."""
    parts = {"attention": ("q", "k", "v", "out_proj"), "mlp": ("mlp.gate", "mlp.up", "mlp.down")}
    block = f"{prefix}decoder.blocks.{{}}.experts.{expert}."
    return {f"{group}.{part}": tuple(block + name for name in names) for part, names in parts.items()}


def adaptable_linears(model: nn.Module, groups: LinearGroups) -> dict[str, nn.Module]:
    """The linears that the groups name, by their names in the model; where adapters are in it, those inside them."""
    patterns = [pattern for some in groups.values() for pattern in some]
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        linear = getattr(module, "base_layer", module)
        if isinstance(linear, ADAPTABLE) and any(matches(pattern, own_name(name)) for pattern in patterns):
            found[name] = linear
    return found


def select_linears(model: nn.Module, groups: LinearGroups, targets: Sequence[str]) -> list[str]:
    """The names of the linears that are in one of the groups `targets`.

    Raises ValueError for a group that the family does not have, and for one of which the model has no linear.
    """
    selected: list[str] = []
    for target in targets:
        names = [group for group in groups if group == target or group.startswith(f"{target}.")]
        if not names:
            known = dict.fromkeys(part for group in groups for part in (group.partition(".")[0], group))
            raise ValueError(f"got the target {target!r}: expected groups of linears, {', '.join(known)}")
        found = list(adaptable_linears(model, {name: groups[name] for name in names}))
        if not found:
            raise ValueError(f"got the target {target!r}, of which this model has no linear: leave it out")
        selected += found
    return list(dict.fromkeys(selected))


def require_peft() -> None:
    """Raise ValueError, with what to install, where PEFT is not there."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError(f"adapters need PEFT: pip install 'unimm[lora]' ({error})") from error
