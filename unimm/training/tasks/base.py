"""The protocol of a task that the trainer trains, and the tasks that recipes know by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from torch import nn

from unimm.training.config import TrainConfig, suggestion
from unimm.training.lora import add_adapter
from unimm.training.losses import LossSum
from unimm.training.packing import SampleBuilder

# name in a recipe -> module and class; imported only when it is needed
TRAINING_TASKS = {
    "bagel": "unimm.training.tasks.bagel:BagelTask",
    "bagel_grpo": "unimm.training.tasks.bagel_grpo:BagelGRPOTask",
    "dc_ae": "unimm.training.tasks.dc_ae:DCAETask",
    "emu3": "unimm.training.tasks.emu3:Emu3Task",
    "emu3_vq": "unimm.training.tasks.emu3_vq:Emu3VQTask",
    "janus": "unimm.training.tasks.janus:JanusTask",
    "janus_grpo": "unimm.training.tasks.janus_grpo:JanusGRPOTask",
    "janusflow": "unimm.training.tasks.janusflow:JanusFlowTask",
    "kl_vae": "unimm.training.tasks.kl_vae:KLTask",
    "magvit_v2": "unimm.training.tasks.magvit_v2:MagvitV2Task",
    "metaquery": "unimm.training.tasks.metaquery:MetaQueryTask",
    "qwen2_5_vl": "unimm.training.tasks.qwen2_5_vl:QwenVLTask",
    "semantic_vq": "unimm.training.tasks.semantic_vq:SemanticVQTask",
    "show_o": "unimm.training.tasks.show_o:ShowOTask",
    "uniworld": "unimm.training.tasks.uniworld:UniWorldTask",
    "uniworld_task_head": "unimm.training.tasks.uniworld_task_head:TaskHeadTask",
    "vit": "unimm.training.tasks.vit:ViTTask",
    "vq": "unimm.training.tasks.vq:VQTask",
}
# the same for recipes with `data`: tasks on one's own datasets (RecordTask)
RECORD_TASKS = {
    "bagel": "unimm.training.tasks.bagel_records:BagelRecordTask",
    "dc_ae": "unimm.training.tasks.autoencoder_records:DCAERecordTask",
    "emu3": "unimm.training.tasks.emu3_records:Emu3RecordTask",
    "janus": "unimm.training.tasks.janus_records:JanusRecordTask",
    "janusflow": "unimm.training.tasks.janus_records:JanusFlowRecordTask",
    "kl_vae": "unimm.training.tasks.autoencoder_records:KLRecordTask",
    "metaquery": "unimm.training.tasks.metaquery_records:MetaQueryRecordTask",
    "show_o": "unimm.training.tasks.show_o_records:ShowORecordTask",
    "uniworld": "unimm.training.tasks.uniworld_records:UniWorldRecordTask",
    "vq": "unimm.training.tasks.autoencoder_records:VQRecordTask",
}
# values of `task` in recipes of earlier versions
RENAMED_TASKS = {
    "dcae": "dc_ae",
    "decoupling": "experiments.decoupling.task:DecouplingTask",
    "deciding": "uniworld_task_head",
    "reader": "qwen2_5_vl",
    "semantic": "semantic_vq",
    "shapes": "bagel",
    "vae": "kl_vae",
    "vision": "vit",
}


class TrainingTask(Protocol):
    """A model and what it is trained for. Parameters with `requires_grad` are trained, the rest is left as it is."""

    name: str
    model: nn.Module
    loss_names: tuple[str, ...]

    def losses(self, batch: Any) -> dict[str, LossSum]:
        """Losses by name, unweighted; those of kinds that the batch lacks may be left out.

        Moves the batch.
        """

    def loss_counts(self, batch: Any) -> dict[str, int]:
        """The counts of the losses that `losses` will return, which need no model: those of a step's batches are added
        up before the first of them is run."""

    def sample_image(self) -> Image.Image | None:
        """An image to judge the run by, or None; called without gradients, in eval mode, with the averaged weights in
        place."""

    def save(self, folder: Path) -> None:
        """Write the released layout into an empty folder; called as `sample_image` is."""


@runtime_checkable
class StepTask(TrainingTask, Protocol):
    """A task whose batches depend on their number alone."""

    # a pure function of the batch's number (and of the recipe's seed), on the CPU. It is sent to a worker process, so it
    # should hold no model; whatever noise a batch needs is sampled here
    batch: Callable[[int], Any]


@runtime_checkable
class RecordTask(TrainingTask, Protocol):
    """A task of recipes with `data`, whose batches are made of records."""

    sample_builder: SampleBuilder[Any]


def build_task(recipe: TrainConfig) -> TrainingTask:
    """The task that a recipe names, with the model that it describes; `module:Class` names one of another package.

    Raises ValueError for a name that is neither.
    """
    tasks = TRAINING_TASKS if recipe.data is None else RECORD_TASKS
    if recipe.task in TRAINING_TASKS and recipe.task not in tasks:
        raise ValueError(f"got data for the task {recipe.task!r}: expected none, or one of {sorted(RECORD_TASKS)}")
    module, colon, name = tasks.get(recipe.task, recipe.task).partition(":")
    if not colon:
        known = sorted(TRAINING_TASKS)
        renamed = RENAMED_TASKS.get(recipe.task)
        hint = f": it is called {renamed!r} now" if renamed else suggestion(recipe.task, known)
        raise ValueError(f"got task {recipe.task!r}, expected one of {known}, or module:Class{hint}")
    try:
        task_class = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"got task {recipe.task!r}, expected a module:Class that can be imported: {error}; a module of the working "
            f"folder needs `PYTHONPATH=.`"
        ) from error
    task = task_class.from_recipe(recipe)
    if recipe.lora is not None:
        base = recipe.model.get("from_pretrained")
        add_adapter(task.model, recipe.lora, task=recipe.task, seed=recipe.seed, base=base)
    return task
