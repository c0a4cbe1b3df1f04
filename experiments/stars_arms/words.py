"""A bagel-nano that was taught two-chain rules in words alone: the base that STARS on mapping needs."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.arms import arm_recipe, bagel_dataset, bagel_options, train_arms
from unimm.checkpoint.atomic import copy_file
from unimm.checkpoint.hub import resolve
from unimm.data.batching import sample_tasks
from unimm.data.shapes import Example, example
from unimm.data.shapes.mapping_pairs import mapping_pair
from unimm.models.bagel.model import Bagel
from unimm.training.freezing import freeze
from unimm.training.tasks.bagel import BagelBatch, BagelBatchImages, BagelDataset, BagelTask
from unimm.training.tasks.bagel_plans import PlannedPart

LEVELS = (1, 2, 3)
# beside the texts, so that drawing is not spoilt by them; reasoning about sums, with its image, as in the base
OPTIONS = bagel_options(
    {"draw.one": 2, "draw.count": 2, "reason.math1": 1, "reason.math2": 1, "reason.math3": 1},
    timesteps_per_image=1,
    think_prob=0.7,
)
WEIGHTS = {"draw": 1.0, "reason": 1.0, "think": 1.0, "edit": 0.0, "caption": 0.0, "answer": 0.0, "fact": 0.0}


@dataclass(frozen=True, kw_only=True)
class WordsDataset(BagelDataset):
    """Batches of which a part is reasoning about pairs of questions, written out, with no image behind it."""

    # of the samples of a batch
    n_words: int

    def __call__(self, step: int) -> BagelBatch:
        rng = random.Random(f"{self.seed}/{step}")
        n_drawn = self.batch_size - self.n_words
        tasks = sample_tasks(self.options.tasks, n_drawn, rng)
        drawn = [example(task, step * n_drawn + i, seed=self.seed) for i, task in enumerate(tasks)]
        return self.batch([*(self.augment(one, rng) for one in drawn), *self.words(step)], rng)

    def words(self, step: int) -> list[Example]:
        """Both questions of pairs of all levels; the train split's."""
        found: list[Example] = []
        for i in range(self.n_words // 2):
            index = step * self.n_words // 2 + i
            pair = mapping_pair(LEVELS[index % len(LEVELS)], index, seed=self.seed)
            found += [replace(one, task="think.pair", answer=f"<think>{one.think}</think>") for one in pair]
        return found

    def plan(self, one: Example, images: BagelBatchImages, rng: random.Random) -> list[PlannedPart]:
        """The released plan; of a pair the system prompt of thinking, the question and the reasoning alone."""
        if one.task != "think.pair":
            return super().plan(one, images, rng)
        assert one.answer is not None
        texts = [self.text_part(self.config.defaults.think_generate_prompt), self.text_part(one.prompt)]
        return [PlannedPart(part) for part in (*texts, self.answer_part(one.answer))]


def teach_words(model_name: str, out: Path, *, seed: int, steps: int) -> dict[str, Any]:
    """Train a release so, and write it as a release; returns the means of the losses over the run."""
    model = Bagel.from_pretrained(model_name)
    freeze(model, ("vae.", "vision."))
    recipe = arm_recipe("bagel", seed=seed, steps=steps, batch_size=14, lr=3e-4, loss_weights=WEIGHTS)
    dataset = bagel_dataset(WordsDataset, model, OPTIONS, recipe, n_words=8)
    (trainer,) = train_arms([BagelTask(model, dataset, Path())], recipe)
    model.save_pretrained(out, dtype="float32")
    copy_file(resolve(model_name) / "ae.safetensors", out / "ae.safetensors")
    return trainer.report()["losses"]
