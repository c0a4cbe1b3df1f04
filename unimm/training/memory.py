"""How much memory a step of a recipe takes of each device, predicted without weights and without the device.

Weights, gradients, averages and the optimisers' states are counted from their shapes; activations by a step without
values (unimm.training.fake_device). What the allocator and the libraries take for themselves is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unimm.checkpoint.valueless import without_values
from unimm.training.config import TrainConfig
from unimm.training.ema import EMA
from unimm.training.fake_device import FakeDevice, LiveBytes
from unimm.training.optim import Optimizers
from unimm.training.planned_batches import planned_batches
from unimm.training.precision import resolve_precision
from unimm.training.tasks.base import TrainingTask, build_task
from unimm.training.throughput import CountingTask


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that a device holds at the peak of a step, and the numbers of parameters and of a batch's tokens.

    activations: with inputs, and what the update makes for itself; gradients: those that are whole at the peak.
    """

    device_type: str
    n_parameters: int
    n_trained: int
    n_tokens: int
    weights: int
    optimizers: int
    average: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The bytes of each part, by its name."""
        return {
            "weights": self.weights,
            "optimisers' states": self.optimizers,
            "averaged weights": self.average,
            "gradients": self.gradients,
            "activations": self.activations,
        }

    def to_json(self) -> dict[str, Any]:
        """All numbers, with the peak."""
        return {**dataclasses.asdict(self), "total": self.total}


def plan_recipe(recipe: TrainConfig, *, device_type: str) -> MemoryPlan:
    """The memory of a step of a recipe on one device of this type ("cpu" or "cuda"); nothing is read but configs.

    Raises ValueError for a device of another type, and what building the task raises.
    """
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"got the device {device_type!r}: expected cpu or cuda")
    with without_values():
        task = build_task(recipe)
    batches = planned_batches(task, recipe, min(2, recipe.gradient_accumulation))
    return plan_memory(task, recipe, batches, device_type=device_type)


def plan_memory(task: TrainingTask, recipe: TrainConfig, batches: Sequence[Any], *, device_type: str) -> MemoryPlan:
    """The memory of a step of a task on one device of this type. batches: of one step, of which two will do.

    The task's model is left without values.
    """
    recipe = resolve_precision(recipe, torch.device(device_type))
    n_tokens = task.step_counts(batches[0]).tokens if isinstance(task, CountingTask) else 0
    device = FakeDevice(device_type)
    weights = tensor_bytes((*task.model.parameters(), *task.model.buffers()))
    device.place(task.model)
    trained = [p for p in task.model.parameters() if p.requires_grad]
    peak = backward_peak(device, task, recipe, batches)
    states, average, update = update_bytes(device, task.model, recipe, trained)
    gradients = tensor_bytes(trained)
    # the update begins when activations are gone; what it makes for itself lies beside all gradients
    if gradients + update > peak.total:
        peak = LiveBytes(activations=update, gradients=gradients)
    return MemoryPlan(
        device_type=device_type,
        n_tokens=n_tokens,
        n_parameters=sum(p.numel() for p in task.model.parameters()),
        n_trained=sum(p.numel() for p in trained),
        weights=weights,
        gradients=peak.gradients,
        optimizers=states,
        average=average,
        activations=peak.activations,
    )


def backward_peak(device: FakeDevice, task: TrainingTask, recipe: TrainConfig, batches: Sequence[Any]) -> LiveBytes:
    """What is alive beside weights at the peak of the forwards and backwards of a step, whose gradients stay."""
    task.model.train()
    device.count_gradients([p for p in task.model.parameters() if p.requires_grad])
    # the second batch finds the gradients of the first, and the third no more
    for batch in batches[:2]:
        with device.run():
            # the CPU's autocast: tensors without values are all on the CPU
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                losses = task.losses(batch)
            means = [recipe.loss_weights[name] * loss.mean.float() for name, loss in losses.items()]
            torch.stack(means).sum().backward()
            del losses, means
    return device.peak


def update_bytes(
    device: FakeDevice, model: nn.Module, recipe: TrainConfig, trained: Sequence[nn.Parameter]
) -> tuple[int, int, int]:
    """What the optimisers keep, the average, and what an update makes for itself at its peak."""
    with device.run():
        optimizers = list(Optimizers(model, recipe).optimizers.values())
        ema = EMA(model, recipe.ema_decay)
        for _ in range(2):  # the first update allocates what the second finds
            device.peak = LiveBytes()
            before = device.live.total
            torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
            ema.update()
            update = max(0, device.peak.total - before)
    states = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
    kept = tensor_bytes(x for x in states if isinstance(x, Tensor))
    return kept, tensor_bytes(ema.weights.values()), update


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors; those that share memory count once."""
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(found.values())
