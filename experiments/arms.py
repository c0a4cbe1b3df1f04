"""Training of an arm of an experiment in memory: minutes long, without checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from unimm.models.bagel.model import Bagel
from unimm.training.config import TrainConfig
from unimm.training.tasks.bagel import BagelDataset, BagelTrainingConfig
from unimm.training.tasks.base import StepTask
from unimm.training.trainer import Trainer

# of a short fine-tuning or training, where an experiment does not say otherwise
ARM = {
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "muon": (),
    "schedule": "cosine",
    "min_lr_ratio": 0.05,
    "max_grad_norm": 1.0,
    "ema_decay": 0.95,
    "precision": "float32",
    "save_every": 10**6,
    "sample_every": 10**6,
}

Dataset = TypeVar("Dataset", bound=BagelDataset)


def bagel_options(tasks: Mapping[str, float], **more: Any) -> BagelTrainingConfig:
    """The options of a Bagel that is fine-tuned on tasks of the shapes world, with its parts as they are."""
    options = {
        "timesteps_per_image": 2,
        "think_prob": 0.0,
        "dropout": {"text": 0.1, "vae": 0.1, "vit": 0.1},
        "novel_colours": 0.2,
        "novel_shapes": 0.12,
        **more,
    }
    return BagelTrainingConfig(tasks=tasks, **options, vocab_size=1, vae="", vit="", frozen=(), compile=False)


def bagel_dataset(
    dataset: type[Dataset], model: Bagel, options: BagelTrainingConfig, recipe: TrainConfig, **more: Any
) -> Dataset:
    """Batches of a recipe for a Bagel, by number."""
    return dataset(
        options=options,
        config=model.config,
        processor=model.processor,
        tokenizer=model.text_tokenizer,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        **more,
    )


def arm_recipe(task: str, *, seed: int, steps: int, batch_size: int, lr: float, **more: Any) -> TrainConfig:
    """The numbers of an arm."""
    numbers = {"warmup_steps": max(1, steps // 10), "log_every": steps, **ARM, **more}
    return TrainConfig(task=task, seed=seed, steps=steps, batch_size=batch_size, lr=lr, **numbers)


def train_arms(
    tasks: Sequence[StepTask],
    recipe: TrainConfig,
    *,
    every: int | None = None,
    watch: Callable[[int, Sequence[Trainer]], None] | None = None,
) -> list[Trainer]:
    """Train tasks side by side for the recipe's steps, on the same batches, which the first of them makes.

    The models end with their averaged weights, in eval mode. watch: called with the step, and the trainers, before the
    first step and then `every` so many.
    """
    trainers = [Trainer(task, recipe, torch.device("cpu")) for task in tasks]
    make = tasks[0].batch
    for step in range(recipe.steps):
        if watch is not None and every and step % every == 0:
            watch(step, trainers)
        batch = make(step)
        for trainer in trainers:
            trainer.update(batch)
    if watch is not None:
        watch(recipe.steps, trainers)
    for trainer in trainers:
        trainer.ema.copy_to_model(trainer.ema.weights)
        trainer.model.eval()
    return trainers
