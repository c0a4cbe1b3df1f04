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
from unimm.data.batching import dealt
from unimm.data.shapes import Example, example
from unimm.models.uniworld.model import UniWorld
from unimm.models.uniworld.processor import UniWorldPrompts
from unimm.nn.layers import MLP
from unimm.sequence.parts import Item
from unimm.training.config import Recipe, strict
from unimm.training.samples import sheet

DROPOUT = 0.3  # between the head's layers, as released
ANSWERS, DRAWS = range(2)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the recipe's `options` may say."""

    # samples of each task in a batch, or their weights (training/tasks.py)
    tasks: Mapping[str, int]
    # the folder of a UniWorld, which stays as it is but for the head
    model: str
    # width inside the head
    hidden: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples to be read, and what is to be done of each [B]: ANSWERS or DRAWS."""

    samples: list[list[Item]]
    wanted: Tensor


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    tasks: Mapping[str, int]
    prompts: UniWorldPrompts
    size: int
    seed: int

    def __call__(self, step: int) -> Batch:
        dice = random.Random(f"{self.seed}/{step}/requests")
        tasks = dealt(self.tasks, self.size, dice)
        return self.batch([example(task, step * self.size + i, seed=self.seed) for i, task in enumerate(tasks)])

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Examples as they are asked, and whether each asks for a picture."""
        shown = [[Image.fromarray(image) for image in one.images] for one in examples]
        return Batch(
            samples=[self.prompts.drawing(one.prompt, some) for one, some in zip(examples, shown, strict=True)],
            wanted=torch.tensor([ANSWERS if one.target is None else DRAWS for one in examples]),
        )


class DecidingObjective:
    """Say whether a request asks for words or for a picture."""

    name = "uniworld-decider"
    loss_names = ("decide",)

    def __init__(self, model: UniWorld, batch: Requests, source: Path):
        self.model, self.batch, self.source = model, batch, source

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> DecidingObjective:
        """A fresh head on a trained UniWorld."""
        options = strict(Options, recipe.options, where="options")
        source = hub.resolve(options.model)
        model = UniWorld.from_pretrained(source)
        torch.manual_seed(recipe.seed)
        model.cfg = replace(model.cfg, decide_hidden=options.hidden)
        model.requires_grad_(False).decide = MLP(model.cfg.reader.decoder.dim, options.hidden, 2, "silu")
        requests = Requests(tasks=options.tasks, prompts=model.prompts, size=recipe.batch, seed=recipe.seed)
        return cls(model, requests, source)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The mean cross entropy of the two votes."""
        head, wanted = self.model.decide, batch.wanted.to(self.model.device)
        assert head is not None, "made with the model"
        with torch.no_grad():
            seen = self.model.asker(batch.samples, self.model.reader.read(batch.samples))
        hidden = F.dropout(head.act(head.fc1(seen.float())), DROPOUT, head.training)
        return {"decide": F.cross_entropy(head.fc2(hidden), wanted)}

    def picture(self) -> Image.Image:
        """A sheet of test prompts drawn, which does not change."""
        return sheet(self.model)

    def save(self, folder: Path) -> None:
        """The whole model in bfloat16; the VAE's file as it was."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        if (self.source / "vae" / "ae.safetensors").exists():
            shutil.copyfile(self.source / "vae" / "ae.safetensors", folder / "vae" / "ae.safetensors")
