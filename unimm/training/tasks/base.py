"""What the loop asks of a task that it trains, and the tasks it knows by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from unimm.training.config import TrainConfig, nearest

# name in a recipe -> module and class; imported only when asked for
TRAINING_TASKS = {
    "kl_vae": "unimm.training.tasks.kl_vae:KLTask",
    "dc_ae": "unimm.training.tasks.dc_ae:DCAETask",
    "qwen2_5_vl": "unimm.training.tasks.qwen2_5_vl:QwenVLTask",
    "vq": "unimm.training.tasks.vq:VQTask",
    "semantic_vq": "unimm.training.tasks.semantic_vq:SemanticVQTask",
    "janus": "unimm.training.tasks.janus:JanusTask",
    "decoupling": "experiments.decoupling.task:DecouplingTask",
    "janusflow": "unimm.training.tasks.janusflow:JanusFlowTask",
    "metaquery": "unimm.training.tasks.metaquery:MetaQueryTask",
    "uniworld": "unimm.training.tasks.uniworld:UniWorldTask",
    "uniworld_task_head": "unimm.training.tasks.uniworld_task_head:TaskHeadTask",
    "vit": "unimm.training.tasks.vit:ViTTask",
    "bagel": "unimm.training.tasks.bagel:BagelTask",
}


class TrainingTask(Protocol):
    """A model and what it is trained for. Parameters with `requires_grad` are trained, the rest is left as it is."""

    name: str
    model: nn.Module
    loss_names: tuple[str, ...]
    # a pure function of the step (and of the recipe's seed), on the CPU. It travels to a worker process, so it should
    # hold no model; whatever noise a step needs is drawn here
    batch: Callable[[int], Any]

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Mean losses by name, unweighted; a step may leave out tasks that its batch lacks. Moves the batch itself."""

    def sample_image(self) -> Image.Image:
        """Samples to look at; called without gradients, in eval mode, with the average weights in place."""

    def save(self, folder: Path) -> None:
        """Write the released layout into an empty folder; called as `picture` is."""


def build_task(recipe: TrainConfig) -> TrainingTask:
    """The objective that a recipe names, with the model that it describes."""
    if recipe.task not in TRAINING_TASKS:
        raise ValueError(
            f"got objective {recipe.task!r}, expected one of {sorted(TRAINING_TASKS)}{nearest(recipe.task, TRAINING_TASKS)}"
        )
    module, name = TRAINING_TASKS[recipe.task].split(":")
    return getattr(import_module(module), name).from_recipe(recipe)
