"""A task's model on the devices of a run: whole on every rank or in shards, as the recipe's `distributed` says."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unimm.distributed.gradients import clip_gradients, sum_gradients
from unimm.distributed.ranks import Ranks
from unimm.distributed.recompute import recompute_activations
from unimm.distributed.sharding import ShardedModel, build_mesh, local_tensor, mixed_precision
from unimm.models.base import UnifiedModel
from unimm.models.parallel_plan import ParallelPlan, find_modules
from unimm.training.config import DistributedConfig, TrainConfig
from unimm.training.losses import LossSum
from unimm.training.tasks.base import TrainingTask

logger = logging.getLogger(__name__)


class TaskLosses(nn.Module):
    """A task's losses as the forward of a module around its model: what is in shards is whole in a forward alone."""

    def __init__(self, task: TrainingTask, recipe: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.model = task.model
        self.task = task
        self.loss_names = tuple(recipe.loss_weights)
        self.device_type = device.type
        self.uses_autocast = recipe.precision == "bfloat16"

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The sums of a batch's losses, by name.

        Raises ValueError for losses of other names or counts than the task said.
        """
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.uses_autocast):
            losses = self.task.losses(batch)
        self.check(losses, self.task.loss_counts(batch))
        return {name: loss.total for name, loss in losses.items()}

    def check(self, losses: Mapping[str, LossSum], counts: Mapping[str, int]) -> None:
        """Raise ValueError for losses that the recipe gives no weight, or whose counts are not those that the task
        said."""
        unknown = sorted(losses.keys() - set(self.loss_names))
        if unknown or not losses:
            raise ValueError(
                f"{self.task.name!r} returned the losses {sorted(losses)}, expected some of "
                f"{sorted(self.loss_names)}: correct its loss_names"
            )
        found = {name: loss.count for name, loss in losses.items()}
        if found != dict(counts):
            raise ValueError(
                f"{self.task.name!r} returned losses over {found}, expected {dict(counts)}, the counts of the batch: "
                "correct its loss_counts"
            )


class DistributedModel:
    """The model of a task, whole on every rank or in shards, and its losses."""

    def __init__(self, task: TrainingTask, recipe: TrainConfig, ranks: Ranks) -> None:
        """Raises ValueError where the recipe's numbers do not fit the ranks, or the model has no parts to shard."""
        self.model = task.model
        self.ranks = ranks
        self.losses = TaskLosses(task, recipe, ranks.device)
        self.sharded: ShardedModel | None = None
        config = recipe.distributed or DistributedConfig()
        shard, replicate = mesh_shape(config, ranks, can_shard=isinstance(task.model, UnifiedModel))
        recompute_blocks(task, config)
        if shard == 1 and not config.cpu_offload:
            task.model.to(ranks.device)
            return
        plan = find_plan(task)
        self.sharded = ShardedModel(
            self.losses,
            ranks,
            build_mesh(ranks, shard=shard, replicate=replicate),
            blocks=list(find_modules(task.model, plan.blocks).values()),
            ahead_of_blocks=list(find_modules(task.model, plan.ahead_of_blocks).values()),
            kept_whole=kept_whole(task.model),
            precision=mixed_precision(
                torch.bfloat16 if recipe.precision == "bfloat16" else None, getattr(torch, config.reduce_dtype)
            ),
            cpu_offload=config.cpu_offload,
        )
        logger.info("weights in %d shards, %d times", shard, replicate)

    def finish_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Let every rank have the sum of all ranks' gradients, of its shards or of all."""
        if self.sharded is None:
            sum_gradients(parameters, self.ranks)
        else:
            self.sharded.finish_gradients()

    def clip_gradients(self, parameters: list[nn.Parameter], max_norm: float) -> float:
        """Scale the gradients down to a norm where theirs is larger; returns theirs."""
        if self.sharded is None:
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
        local = [local_tensor(p.grad) for p in parameters if p.grad is not None]
        return clip_gradients(local, max_norm, self.sharded.sum_over_shards).item()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Weights are whole on every rank inside of the body, in which the ranks need not do the same."""
        if self.sharded is not None:
            with self.sharded.whole():
                yield
        else:
            yield
            self.ranks.barrier()


def recompute_blocks(task: TrainingTask, config: DistributedConfig) -> None:
    """Let the blocks of a task's model compute their activations again for the backward, where the recipe says so."""
    if config.activation_checkpointing != "none":
        blocks = find_modules(task.model, find_plan(task).blocks)
        recompute_activations(blocks.values(), selective=config.activation_checkpointing == "selective")


def find_plan(task: TrainingTask) -> ParallelPlan:
    """Which parts of a task's model are blocks. Raises ValueError where it is no family's."""
    if not isinstance(task.model, UnifiedModel):
        raise ValueError(
            f"got `distributed` with shards, cpu_offload or activation_checkpointing for {task.name!r}, expected one of "
            "a family's models: leave them out, and every device holds all weights"
        )
    return task.model.PARALLEL_PLAN


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that every rank holds: frozen ones that stay in float32, as a VAE's, whatever the others are in."""
    assert isinstance(model, UnifiedModel), "a plan is one of a family"
    return {p for name, p in model.named_parameters() if name.startswith(model.KEEP_FLOAT32) and not p.requires_grad}


def mesh_shape(config: DistributedConfig, ranks: Ranks, *, can_shard: bool) -> tuple[int, int]:
    """In how many shards the weights lie, and how many times."""
    shard = config.shard or (ranks.size // (config.replicate or 1) if can_shard else 1)
    replicate = config.replicate or ranks.size // shard
    if shard * replicate != ranks.size:
        raise ValueError(
            f"got shard {config.shard} and replicate {config.replicate} in `distributed`, expected a product of "
            f"{ranks.size}, the processes of the run: correct the recipe, or start as many (0 stands for what is left)"
        )
    if config.cpu_offload and ranks.device.type == "cpu":
        raise ValueError("got cpu_offload on the device cpu, where all weights are already: leave it out")
    return shard, replicate
