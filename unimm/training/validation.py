"""The losses on batches that no step trains on: the same batches with the same noise every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unimm.data.mix import MixGroup
from unimm.distributed.ranks import Ranks
from unimm.training.batches import BatchSource, StepBatches
from unimm.training.config import TrainConfig
from unimm.training.fields import held_out_seed
from unimm.training.record_batches import PackedBatches, describe_groups, held_out_groups, open_groups
from unimm.training.tasks.base import RecordTask, TrainingTask

# of the global generators, which a task might draw from
SEED = 0


@runtime_checkable
class HeldOutTask(TrainingTask, Protocol):
    """A task that makes its own batches, with some for validation."""

    # as `batch` of the task, on a held-out part
    held_out_batch: Callable[[int], Any]


class Validation:
    """The validation that a recipe asks for: the mean of every loss over its held-out batches."""

    def __init__(
        self,
        task: TrainingTask,
        recipe: TrainConfig,
        groups: Sequence[MixGroup] | None = None,
        *,
        ranks: Ranks | None = None,
    ) -> None:
        """groups: the datasets of the recipe's `data`. ranks: each has a share of the batches.

        Raises ValueError where nothing is held out, and for datasets that cannot be opened.
        """
        assert recipe.validation is not None, "the recipe asks for one"
        self.task = task
        self.recipe = recipe
        self.config = recipe.validation
        self.ranks = ranks or Ranks()
        # what is wrong is said now, and not after an hour
        self.source = self._own_batches() if recipe.data is None else self._record_batches(groups or ())

    def _own_batches(self) -> Callable[[], BatchSource]:
        """Batches that the task makes."""
        if self.config.data is not None or not isinstance(self.task, HeldOutTask):
            raise ValueError(
                f"got validation for the task {self.recipe.task!r}, which has no held-out batches of "
                f"{'records without data to train on' if self.config.data else 'its own'}: leave it out"
            )
        batch = self.task.held_out_batch
        return lambda: StepBatches(batch, rank=self.ranks.rank, world_size=self.ranks.size)

    def _record_batches(self, groups: Sequence[MixGroup]) -> Callable[[], BatchSource]:
        """Batches of records: of the validation's own datasets, or of what those to train on hold out."""
        own = self.config.data
        held_out = held_out_groups(groups) if own is None else open_groups(own, where="validation.data")
        if own is not None:
            self.ranks.check_equal(describe_groups(held_out, where="validation.data"), what="datasets")
        if not held_out or not isinstance(self.task, RecordTask):
            raise ValueError(
                "got validation, and groups of data that hold out nothing: give one `held_out: 0.01`, say, or "
                "validation `data` of its own"
            )
        data = self.recipe.data if own is None else own
        assert data is not None, "one of both"
        # a few rows have one lane
        recipe = replace(self.recipe, seed=held_out_seed(self.recipe.seed), data=replace(data, lanes=1))
        builder = self.task.sample_builder
        rank = self.ranks.rank
        return lambda: PackedBatches(held_out, builder, recipe, rank=rank, world_size=self.ranks.size)

    def due(self, step: int) -> bool:
        """Whether it is run after this step."""
        return step % self.config.every == 0 or step == self.recipe.steps

    @torch.no_grad()
    def run(
        self, losses: Callable[[Any], Mapping[str, Tensor]], device: torch.device, *, workers: int
    ) -> dict[str, Any]:
        """The means, and their weighted sum, "loss", by the weights as they are; random states stay as they were.

        losses: the sums of a batch's losses, by name. The ranks run as many batches each, one more where they do not
        come out even.
        """
        names = self.task.loss_names
        totals = torch.zeros(len(names), dtype=torch.float64)
        counts = [0] * len(names)
        devices = [device] if device.type == "cuda" else []
        made = closing(self.source().iterate(0, -(-self.config.batches // self.ranks.size), workers=workers))
        with torch.random.fork_rng(devices=devices), made as batches:
            torch.manual_seed(SEED)
            for batch in batches:
                found = losses(batch)
                totals += torch.stack(
                    [found[name].double().cpu() if name in found else totals.new_zeros(()) for name in names]
                )
                of_batch = self.task.loss_counts(batch)
                counts = [n + of_batch.get(name, 0) for n, name in zip(counts, names, strict=True)]
        sums = self.ranks.sum_tensor(totals).tolist()
        means = {name: total / n for name, total, n in zip(names, sums, self.ranks.sum(counts), strict=True) if n}
        weighted = sum(self.recipe.loss_weights[name] * mean for name, mean in means.items())
        return {"weights": self.config.weights, "loss": weighted, "losses": means}
