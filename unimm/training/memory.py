"""How much memory a step of a recipe takes of each device, predicted without weights and without the devices.

Weights, gradients, averages and the optimisers' states are counted from their shapes; activations by a step without
values (unimm.nn.fake_device). What the allocator and the libraries take for themselves is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unimm.checkpoint.save import own_name
from unimm.checkpoint.valueless import without_values
from unimm.distributed.gradients import BUCKET_SIZE
from unimm.distributed.ranks import Ranks
from unimm.nn.fake_device import FakeDevice, LiveBytes
from unimm.training.config import DistributedConfig, TrainConfig
from unimm.training.ema import EMA
from unimm.training.layout import Layout, plan_layout
from unimm.training.optim import Optimizers
from unimm.training.parallel import recompute_blocks
from unimm.training.planned_batches import planned_batches
from unimm.training.precision import resolve_precision
from unimm.training.tasks.base import TrainingTask, build_task
from unimm.training.throughput import CountingTask

# an element of a whole matrix: its float32, and two matrices in bfloat16 of the iteration
MUON_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that each of n_devices holds at the peak of a step, and the numbers of parameters and of a batch's tokens.

    weights, optimizers and average are its shards, where the weights lie in n_shards. gathered: weights that are whole
    for a while. activations: with inputs, and what the update makes for itself; gradients: those that are there at the
    peak. offloaded: in the CPU's memory, in place of the device's.
    """

    device_type: str
    n_devices: int
    n_shards: int
    n_parameters: int
    n_trained: int
    n_tokens: int
    weights: int
    gathered: int
    optimizers: int
    average: int
    gradients: int
    activations: int
    offloaded: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The bytes of each part, by its name."""
        return {
            "weights": self.weights,
            "gathered weights": self.gathered,
            "optimisers' states": self.optimizers,
            "averaged weights": self.average,
            "gradients": self.gradients,
            "activations": self.activations,
        }

    def to_json(self) -> dict[str, Any]:
        """All numbers, with the peak."""
        return {**dataclasses.asdict(self), "total": self.total}


def plan_recipe(recipe: TrainConfig, *, device_type: str, n_devices: int = 1) -> MemoryPlan:
    """The memory of a step of a recipe on devices of this type ("cpu" or "cuda"); nothing is read but configs.

    Raises ValueError for a device of another type, where the recipe's `distributed` does not fit the devices, and what
    building the task raises.
    """
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"got the device {device_type!r}: expected cpu or cuda")
    with without_values():
        task = build_task(recipe)
    batches = planned_batches(task, recipe, min(2, recipe.gradient_accumulation))
    return plan_memory(task, recipe, batches, device_type=device_type, n_devices=n_devices)


def plan_memory(
    task: TrainingTask, recipe: TrainConfig, batches: Sequence[Any], *, device_type: str, n_devices: int = 1
) -> MemoryPlan:
    """The memory of a step of a task on devices of this type. batches: of one step of one device, of which two will do.

    The task's model is left without values.
    """
    recipe = resolve_precision(recipe, torch.device(device_type))
    n_tokens = task.step_counts(batches[0]).tokens if isinstance(task, CountingTask) else 0
    layout = plan_layout(task, recipe, Ranks(size=n_devices, device=torch.device(device_type)))
    recompute_blocks(task, recipe.distributed or DistributedConfig())
    buffers = tensor_bytes(task.model.buffers())
    weights = layout.held_bytes(layout.parameters) + buffers
    peak, gathered = step_peak(task, recipe, batches, layout, device_type=device_type)
    kept = update_bytes(task.model, recipe, layout, device_type=device_type, n_devices=n_devices)
    # the update begins when activations are gone; what it makes for itself lies beside all gradients
    at_update = LiveBytes(activations=kept.update, gradients=layout.held_bytes(layout.trained))
    if at_update.total > peak.total + gathered and not layout.cpu_offload:
        peak = at_update
        gathered = 0
    plan = MemoryPlan(
        device_type=device_type,
        n_devices=n_devices,
        n_shards=layout.n_shards,
        n_tokens=n_tokens,
        n_parameters=sum(p.numel() for p in layout.parameters.values()),
        n_trained=sum(layout.parameters[name].numel() for name in layout.trained),
        weights=weights,
        gathered=gathered,
        gradients=peak.gradients,
        optimizers=kept.optimizers,
        average=kept.average,
        activations=peak.activations,
        offloaded=0,
    )
    return offload(plan, layout, stays=layout.held_bytes(layout.whole) + buffers) if layout.cpu_offload else plan


def offload(plan: MemoryPlan, layout: Layout, *, stays: int) -> MemoryPlan:
    """The same with shards, averages and states in the CPU's memory, where updates are made; the device keeps `stays`
    bytes of weights."""
    moved = plan.weights - stays + plan.optimizers + plan.average + layout.held_bytes(layout.trained)
    return dataclasses.replace(plan, weights=stays, optimizers=0, average=0, offloaded=moved)


# ---- the step


def step_peak(
    task: TrainingTask, recipe: TrainConfig, batches: Sequence[Any], layout: Layout, *, device_type: str
) -> tuple[LiveBytes, int]:
    """What is alive beside weights at the peak of the forwards and backwards of a step, whose gradients stay; and of it
    apart, the weights that are gathered."""
    device = FakeDevice(device_type)
    device.place(task.model, dtypes={name: layout.used_dtype(name) for name in layout.parameters})
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    # the root's gradients stay whole until the end
    root = frozenset(layout.root)
    shards = {name: 0 if layout.cpu_offload else layout.held_bytes([name]) for name in trained}
    held = {id(p): shards[name] for name, p in trained.items() if layout.is_sharded and name not in root}
    device.count_gradients(trained.values(), held=held)
    run_batches(device, task, recipe, batches)
    if not layout.is_sharded:
        return device.peak, 0
    # the next block is on its way while one runs
    gathered = layout.gathered_bytes(layout.root) + 2 * max(map(layout.gathered_bytes, layout.blocks))
    reduced = max(map(layout.reduced_bytes, layout.blocks))
    peak = dataclasses.replace(device.peak, gradients=device.peak.gradients + reduced)
    at_end = sum(shards.values()) + layout.reduced_bytes(layout.root)
    return (peak if peak.total > at_end else LiveBytes(gradients=at_end)), gathered


def run_batches(device: FakeDevice, task: TrainingTask, recipe: TrainConfig, batches: Sequence[Any]) -> None:
    """The forwards and backwards of a step."""
    task.model.train()
    # the second batch finds the gradients of the first, and the third no more
    for batch in batches[:2]:
        with device.run():
            # the CPU's autocast: tensors without values are all on the CPU
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                losses = task.losses(batch)
            means = [recipe.loss_weights[name] * loss.mean.float() for name, loss in losses.items()]
            torch.stack(means).sum().backward()
            del losses, means


# ---- the update


@dataclass(frozen=True, kw_only=True)
class UpdateBytes:
    """What the optimisers keep, the average, and what an update makes for itself at its peak."""

    optimizers: int
    average: int
    update: int


def update_bytes(
    model: nn.Module, recipe: TrainConfig, layout: Layout, *, device_type: str, n_devices: int
) -> UpdateBytes:
    """The memory of updates of a model, which is left without values."""
    device = FakeDevice(device_type)
    device.place(model, dtypes={name: p.dtype for name, p in layout.parameters.items()})
    trained = [p for p in model.parameters() if p.requires_grad]
    with device.run():
        for p in trained:
            p.grad = torch.empty_like(p)
        optimizers = Optimizers(model, recipe)
        ema = EMA(model, recipe.ema_decay)
        for _ in range(2):  # the first update allocates what the second finds
            device.peak = LiveBytes()
            before = device.live.total
            torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
            for optimizer in optimizers.optimizers.values():
                optimizer.step()
            ema.update()
            update = max(0, device.peak.total - before)
    gradients = layout.held_bytes(layout.trained)
    if layout.is_sharded:
        # of a matrix that Muon updates every device holds all
        muon = [optimizers.parameters[name] for name, kind in optimizers.kinds.items() if kind == "muon"]
        update = round(update * gradients / tensor_bytes(trained)) + max(
            (MUON_BYTES * p.numel() for p in muon), default=0
        )
    elif n_devices > 1:
        update = max(update, min(gradients, BUCKET_SIZE * torch.float32.itemsize))
    shares = {own_name(name): layout.share(name) for name in layout.parameters}
    states = sum(x.nbytes * shares[name.rpartition("/")[0]] for name, x in optimizers.tensors().items())
    average = sum(x.nbytes * shares[name] for name, x in ema.weights.items())
    return UpdateBytes(optimizers=round(states), average=round(average), update=update)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors; those that share memory count once."""
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(found.values())
