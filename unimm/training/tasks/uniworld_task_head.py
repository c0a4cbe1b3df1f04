"""Training the head by which UniWorld answers or draws, on what the frozen reader makes of questions and of prompts.

It sees the hidden state at the last "assistant". docs/originals/uniworld.md, "Understand or generate".
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unimm.checkpoint import hub
from unimm.data.batching import sample_tasks
from unimm.data.shapes import Example, example
from unimm.models.uniworld.model import UniWorld
from unimm.models.uniworld.processor import UniWorldProcessor
from unimm.nn.layers import MLP
from unimm.sequence.parts import Part
from unimm.training.config import TrainConfig, strict
from unimm.training.samples import sample_grid

DROPOUT = 0.3  # between the head's layers, as released
ANSWER_CLASS, GENERATE_CLASS = range(2)


@dataclass(frozen=True, kw_only=True)
class TaskHeadTrainingConfig:
    """What the recipe's `options` may say."""

    # samples of each task in a batch, or their weights (training/tasks.py)
    tasks: Mapping[str, int]
    # the folder of a UniWorld, which stays as it is but for the head
    model: str
    # width inside the head
    hidden_dim: int


@dataclass(frozen=True, kw_only=True)
class TaskHeadBatch:
    """Samples to be read, and what is to be done of each [B]: ANSWERS or DRAWS."""

    prompts: list[list[Part]]
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class TaskHeadDataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    tasks: Mapping[str, int]
    prompts: UniWorldProcessor
    batch_size: int
    seed: int

    def __call__(self, step: int) -> TaskHeadBatch:
        rng = random.Random(f"{self.seed}/{step}/requests")
        tasks = sample_tasks(self.tasks, self.batch_size, rng)
        return self.batch([example(task, step * self.batch_size + i, seed=self.seed) for i, task in enumerate(tasks)])

    def batch(self, examples: Sequence[Example]) -> TaskHeadBatch:
        """Examples as they are asked, and whether each asks for a picture."""
        shown = [[Image.fromarray(image) for image in one.images] for one in examples]
        return TaskHeadBatch(
            prompts=[self.prompts.prompt_parts(one.prompt, some) for one, some in zip(examples, shown, strict=True)],
            targets=torch.tensor([ANSWER_CLASS if one.target is None else GENERATE_CLASS for one in examples]),
        )


class TaskHeadTask:
    """Say whether a request asks for words or for a picture."""

    name = "uniworld-decider"
    loss_names = ("decide",)

    def __init__(self, model: UniWorld, batch: TaskHeadDataset, source: Path):
        self.model, self.batch, self.source = model, batch, source

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> TaskHeadTask:
        """A fresh head on a trained UniWorld."""
        options = strict(TaskHeadTrainingConfig, recipe.options, where="options")
        source = hub.resolve(options.model)
        model = UniWorld.from_pretrained(source)
        torch.manual_seed(recipe.seed)
        model.config = replace(model.config, task_head_hidden=options.hidden_dim)
        model.requires_grad_(False).task_head = MLP(model.config.mllm.decoder.dim, options.hidden_dim, 2, "silu")
        requests = TaskHeadDataset(
            tasks=options.tasks, prompts=model.processor, batch_size=recipe.batch_size, seed=recipe.seed
        )
        return cls(model, requests, source)

    def losses(self, batch: TaskHeadBatch) -> dict[str, Tensor]:
        """The mean cross entropy of the two votes."""
        head, wanted = self.model.task_head, batch.targets.to(self.model.device)
        assert head is not None, "made with the model"
        with torch.no_grad():
            seen = self.model.task_head_state(batch.prompts, self.model.mllm.encode(batch.prompts))
        hidden = F.dropout(head.act(head.fc1(seen.float())), DROPOUT, head.training)
        return {"decide": F.cross_entropy(head.fc2(hidden), wanted)}

    def sample_image(self) -> Image.Image:
        """A sheet of test prompts drawn, which does not change."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """The whole model in bfloat16; the VAE's file as it was."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        if (self.source / "vae" / "ae.safetensors").exists():
            shutil.copyfile(self.source / "vae" / "ae.safetensors", folder / "vae" / "ae.safetensors")
