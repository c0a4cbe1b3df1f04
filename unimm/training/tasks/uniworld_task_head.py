"""Training UniWorld's task head, which decides whether a request is answered in words or by an image.

Its input is the frozen MLLM's hidden state at the last "assistant": docs/originals/uniworld.md, "Understand or
generate".
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unimm.checkpoint import hub
from unimm.checkpoint.atomic import copy_file
from unimm.data.batching import sample_tasks
from unimm.data.shapes import TASKS, Example, example
from unimm.models.uniworld.model import UniWorld
from unimm.models.uniworld.processor import UniWorldProcessor
from unimm.nn.layers import MLP
from unimm.sequence.parts import Part
from unimm.training.config import RecipeSection, TrainConfig, from_mapping
from unimm.training.fields import AtLeastOne, TaskWeights, held_out_seed, known_tasks
from unimm.training.losses import LossSum
from unimm.training.samples import sample_grid

# between the head's layers, as released
DROPOUT = 0.3
# classes of the head
ANSWER_CLASS = 0
GENERATE_CLASS = 1


@dataclass(frozen=True, kw_only=True)
class TaskHeadTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Annotated[TaskWeights, known_tasks(TASKS)]
    # the folder of a UniWorld, of which the head alone is trained
    model: str
    # of the head
    hidden_dim: AtLeastOne


@dataclass(frozen=True, kw_only=True)
class TaskHeadBatch:
    """Requests, and the class of each [B]: ANSWER_CLASS or GENERATE_CLASS."""

    prompts: list[list[Part]]
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class TaskHeadDataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    tasks: Mapping[str, int]
    processor: UniWorldProcessor
    batch_size: int
    seed: int

    def __call__(self, step: int) -> TaskHeadBatch:
        rng = random.Random(f"{self.seed}/{step}/requests")
        tasks = sample_tasks(self.tasks, self.batch_size, rng)
        return self.batch([example(task, step * self.batch_size + i, seed=self.seed) for i, task in enumerate(tasks)])

    def batch(self, examples: Sequence[Example]) -> TaskHeadBatch:
        """Examples as requests, with their classes."""
        images = [[Image.fromarray(image) for image in one.images] for one in examples]
        return TaskHeadBatch(
            prompts=[self.processor.prompt_parts(one.prompt, some) for one, some in zip(examples, images, strict=True)],
            targets=torch.tensor([ANSWER_CLASS if one.target is None else GENERATE_CLASS for one in examples]),
        )


class TaskHeadTask:
    """Classify requests by what answers them: words or an image."""

    name = "uniworld-task-head"
    loss_names = ("cross_entropy",)

    def __init__(self, model: UniWorld, batch: TaskHeadDataset, source: Path):
        self.model = model
        self.batch = batch
        # the folder of the trained UniWorld
        self.source = source

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> TaskHeadTask:
        """Build an untrained head on a trained UniWorld."""
        options = from_mapping(TaskHeadTrainingConfig, recipe.options, where="options")
        source = hub.resolve(options.model)
        model = UniWorld.from_pretrained(source)
        torch.manual_seed(recipe.seed)
        model.config = replace(model.config, task_head_hidden=options.hidden_dim)
        model.requires_grad_(False).task_head = MLP(model.config.mllm.decoder.dim, options.hidden_dim, 2, "silu")
        dataset = TaskHeadDataset(
            tasks=options.tasks, processor=model.processor, batch_size=recipe.batch_size, seed=recipe.seed
        )
        return cls(model, dataset, source)

    def losses(self, batch: TaskHeadBatch) -> dict[str, LossSum]:
        """The cross entropy of the head's two classes."""
        head = self.model.task_head
        assert head is not None, "made with the model"
        with torch.no_grad():
            states = self.model.task_head_state(batch.prompts, self.model.mllm.encode(batch.prompts))
        hidden = F.dropout(head.act(head.fc1(states.float())), DROPOUT, head.training)
        targets = batch.targets.to(self.model.device)
        return {"cross_entropy": LossSum.over(F.cross_entropy(head.fc2(hidden), targets, reduction="none"))}

    def loss_counts(self, batch: TaskHeadBatch) -> dict[str, int]:
        """The number of requests."""
        return {"cross_entropy": len(batch.targets)}

    @property
    def held_out_batch(self) -> TaskHeadDataset:
        """Batches of requests that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image:
        """Images of test prompts, which training does not change."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """Write the whole model in bfloat16; the VAE's file as it was."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        if (self.source / "vae" / "ae.safetensors").exists():
            copy_file(self.source / "vae" / "ae.safetensors", folder / "vae" / "ae.safetensors")
