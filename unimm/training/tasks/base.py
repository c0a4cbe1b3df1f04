"""What the loop asks of a task that it trains, and the tasks it knows by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from unimm.training.config import Recipe, nearest

# name in a recipe -> module and class; imported only when asked for
OBJECTIVES = {
    "vae": "unimm.training.tasks.kl_vae:VAEObjective",
    "dcae": "unimm.training.tasks.dc_ae:DCAEObjective",
    "reader": "unimm.training.tasks.qwen2_5_vl:ReaderObjective",
    "vq": "unimm.training.tasks.vq:VQObjective",
    "semantic": "unimm.training.tasks.semantic_vq:SemanticObjective",
    "janus": "unimm.training.tasks.janus:JanusObjective",
    "decoupling": "experiments.decoupling.task:DecouplingObjective",
    "janusflow": "unimm.training.tasks.janusflow:JanusFlowObjective",
    "metaquery": "unimm.training.tasks.metaquery:MetaQueryObjective",
    "uniworld": "unimm.training.tasks.uniworld:UniWorldObjective",
    "deciding": "unimm.training.tasks.uniworld_task_head:DecidingObjective",
    "vision": "unimm.training.tasks.vit:VisionObjective",
    "shapes": "unimm.training.tasks.bagel:ShapesObjective",
}


class Objective(Protocol):
    """A model and what it is trained for. Parameters with `requires_grad` are trained, the rest is left as it is."""

    name: str
    model: nn.Module
    loss_names: tuple[str, ...]
    # a pure function of the step (and of the recipe's seed), on the CPU. It travels to a worker process, so it should
    # hold no model; whatever noise a step needs is drawn here
    batch: Callable[[int], Any]

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Mean losses by name, unweighted; a step may leave out tasks that its batch lacks. Moves the batch itself."""

    def picture(self) -> Image.Image:
        """Samples to look at; called without gradients, in eval mode, with the average weights in place."""

    def save(self, folder: Path) -> None:
        """Write the released layout into an empty folder; called as `picture` is."""


def build(recipe: Recipe) -> Objective:
    """The objective that a recipe names, with the model that it describes."""
    if recipe.objective not in OBJECTIVES:
        raise ValueError(
            f"got objective {recipe.objective!r}, expected one of {sorted(OBJECTIVES)}{nearest(recipe.objective, OBJECTIVES)}"
        )
    module, name = OBJECTIVES[recipe.objective].split(":")
    return getattr(import_module(module), name).from_recipe(recipe)
