"""The losses on batches that no step trains on: the same batches with the same noise every time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any, Protocol, runtime_checkable

import torch

from unimm.training.batches import StepBatches
from unimm.training.config import TrainConfig
from unimm.training.tasks.base import TrainingTask

# of the global generators, which a task might draw from
SEED = 0


@runtime_checkable
class HeldOutTask(TrainingTask, Protocol):
    """A task with batches for validation."""

    # as `batch` of the task, on a held-out part
    held_out_batch: Callable[[int], Any]


class Validation:
    """The validation that a recipe asks for: the mean of every loss over its held-out batches."""

    def __init__(self, task: TrainingTask, recipe: TrainConfig) -> None:
        """Raises ValueError for a task without held-out batches."""
        assert recipe.validation is not None, "the recipe asks for one"
        if not isinstance(task, HeldOutTask):
            raise ValueError(
                f"got validation for the task {recipe.task!r}, which has no held-out batches: leave it out, or give the "
                "task `held_out_batch`"
            )
        self.task = task
        self.recipe = recipe
        self.config = recipe.validation
        # a task without any says so now, and not after an hour
        self.batch = task.held_out_batch

    def due(self, step: int) -> bool:
        """Whether it is run after this step."""
        return step % self.config.every == 0 or step == self.recipe.steps

    @torch.no_grad()
    def run(self, device: torch.device, *, workers: int) -> dict[str, Any]:
        """The means, and their weighted sum, "loss", by the weights as they are; random states stay as they were."""
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        devices = [device] if device.type == "cuda" else []
        source = StepBatches(self.batch)
        made = closing(source.iterate(0, self.config.batches, workers=workers))
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
