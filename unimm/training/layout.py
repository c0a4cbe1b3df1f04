"""How the parameters of a model lie on the devices of a run, in bytes, without the devices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unimm.distributed.ranks import Ranks
from unimm.distributed.sharding import own_parameters
from unimm.models.base import UnifiedModel
from unimm.models.parallel_plan import find_modules
from unimm.training.config import DistributedConfig, TrainConfig
from unimm.training.parallel import find_plan, kept_whole, mesh_shape
from unimm.training.tasks.base import TrainingTask


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parameters of a model by name, and of each what a device holds of it.

    blocks: names of those that are gathered together, a block at a time; root: of those that are gathered for a whole
    step; both are empty where every device holds all. whole: those that every device holds anyway.
    """

    parameters: Mapping[str, Tensor]
    n_shards: int
    cpu_offload: bool
    gathered_dtype: torch.dtype | None
    reduce_dtype: torch.dtype
    blocks: Sequence[Sequence[str]] = ()
    root: Sequence[str] = ()
    whole: frozenset[str] = frozenset()

    @property
    def is_sharded(self) -> bool:
        """Whether weights are gathered to be used; of a single device's where they lie in the CPU's memory."""
        return bool(self.root or self.blocks)

    @property
    def trained(self) -> list[str]:
        """The names of those that are trained."""
        return [name for name, p in self.parameters.items() if p.requires_grad]

    def share(self, name: str) -> float:
        """How much of a parameter a device holds: the same rows as the others, of which the last ones are padded."""
        rows = self.parameters[name].shape[0] if self.parameters[name].ndim else 1
        return 1.0 if name in self.whole or not self.is_sharded else math.ceil(rows / self.n_shards) / rows

    def held_bytes(self, names: Iterable[str]) -> int:
        """What a device holds of some parameters, or of their gradients, while they are not gathered."""
        return sum(round(self.parameters[name].nbytes * self.share(name)) for name in names)

    def used_dtype(self, name: str) -> torch.dtype:
        """The type in which a parameter is whole where it is used."""
        own = self.parameters[name].dtype
        return own if not self.is_sharded or name in self.whole else self.gathered_dtype or own

    def gathered_bytes(self, names: Iterable[str]) -> int:
        """What is gathered of some parameters."""
        return sum(self.parameters[name].numel() * self.used_dtype(name).itemsize for name in names)

    def reduced_bytes(self, names: Iterable[str]) -> int:
        """The whole gradients of those that are trained, and the copies that are added up over the devices."""
        trained = [name for name in names if self.parameters[name].requires_grad]
        return sum(
            self.parameters[name].numel() * (self.used_dtype(name).itemsize + self.reduce_dtype.itemsize)
            for name in trained
        )


def plan_layout(task: TrainingTask, recipe: TrainConfig, ranks: Ranks) -> Layout:
    """The layout of a task's model on the devices of a run, as `DistributedModel` makes it.

    Raises ValueError where the recipe's numbers do not fit the ranks, or the model has no parts to shard.
    """
    config = recipe.distributed or DistributedConfig()
    shard, _ = mesh_shape(config, ranks, can_shard=isinstance(task.model, UnifiedModel))
    named = dict(task.model.named_parameters())
    whole: frozenset[str] = frozenset()
    units: list[list[str]] = [[]]
    if shard > 1 or config.cpu_offload:
        plan = find_plan(task)
        modules = [*find_modules(task.model, (*plan.ahead_of_blocks, *plan.blocks)).values(), task.model]
        names = {id(p): name for name, p in named.items()}
        whole = frozenset(names[id(p)] for p in kept_whole(task.model))
        units = [[names[id(p)] for p in own_parameters(one, modules).values()] for one in modules]
        units = [[name for name in unit if name not in whole] for unit in units]
    return Layout(
        parameters={name: p.detach().to("meta").requires_grad_(p.requires_grad) for name, p in named.items()},
        n_shards=shard,
        cpu_offload=config.cpu_offload,
        gathered_dtype=torch.bfloat16 if recipe.precision == "bfloat16" else None,
        reduce_dtype=getattr(torch, config.reduce_dtype),
        blocks=units[:-1],
        root=units[-1],
        whole=whole,
    )
