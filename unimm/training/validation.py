"""The losses on batches that no step trains on: the same batches with the same noise every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch

from unimm.data.mix import MixGroup
from unimm.training.batches import BatchSource, StepBatches
from unimm.training.config import TrainConfig
from unimm.training.fields import held_out_seed
from unimm.training.record_batches import PackedBatches, held_out_groups, open_groups
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

    def __init__(self, task: TrainingTask, recipe: TrainConfig, groups: Sequence[MixGroup] | None = None) -> None:
        """groups: the datasets of the recipe's `data`.

        Raises ValueError where nothing is held out, and for datasets that cannot be opened.
        """
        assert recipe.validation is not None, "the recipe asks for one"
        self.task = task
        self.recipe = recipe
        self.config = recipe.validation
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
        return lambda: StepBatches(batch)

    def _record_batches(self, groups: Sequence[MixGroup]) -> Callable[[], BatchSource]:
        """Batches of records: of the validation's own datasets, or of what those to train on hold out."""
        own = self.config.data
        held_out = held_out_groups(groups) if own is None else open_groups(own, where="validation.data")
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
        return lambda: PackedBatches(held_out, builder, recipe)

    def due(self, step: int) -> bool:
        """Whether it is run after this step."""
        return step % self.config.every == 0 or step == self.recipe.steps

    @torch.no_grad()
    def run(self, device: torch.device, *, workers: int) -> dict[str, Any]:
        """The means, and their weighted sum, "loss", by the weights as they are; random states stay as they were."""
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        devices = [device] if device.type == "cuda" else []
        made = closing(self.source().iterate(0, self.config.batches, workers=workers))
        with torch.random.fork_rng(devices=devices), made as batches:
            torch.manual_seed(SEED)
            for batch in batches:
                with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                    losses = self.task.losses(batch)
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0.0) + loss.total.item()
                    counts[name] = counts.get(name, 0) + loss.count
        means = {name: total / counts[name] for name, total in totals.items() if counts[name]}
        weighted = sum(self.recipe.loss_weights[name] * mean for name, mean in means.items())
        return {"weights": self.config.weights, "loss": weighted, "losses": means}
