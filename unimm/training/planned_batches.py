"""Batches to plan a run by, without its data: the task's own, or packs of the largest images that a recipe lets in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from PIL import Image

from unimm.data.records import Record, RecordImage, RecordText
from unimm.training.config import TrainConfig
from unimm.training.packing import PackableSample, SampleBuilder
from unimm.training.tasks.base import RecordTask, StepTask, TrainingTask

# sides of images, of which the first that fits is taken; families bring larger ones down to their largest
SIDES = (4096, 2048, 1024, 512, 256, 128, 64, 32)
CAPTION = "a photograph of a small red house beside a lake, in the evening light, with mountains behind it"


def planned_batches(task: TrainingTask, recipe: TrainConfig, n: int) -> list[Any]:
    """n batches of the kind and size that a run will have."""
    if isinstance(task, RecordTask):
        return [largest_batch(task.sample_builder, recipe) for _ in range(n)]
    assert isinstance(task, StepTask), "a task makes batches in one of two ways"
    return [task.batch(i) for i in range(n)]


def largest_batch(builder: SampleBuilder[Any], recipe: TrainConfig) -> Any:
    """As many of the largest samples as a batch of the recipe has room for."""
    rng = random.Random(recipe.seed)
    packing = recipe.packing
    limit = packing.max_tokens_per_sample if packing else None
    sample = largest_sample(builder, limit, rng)
    if packing is None:
        return builder.collate([sample] * recipe.batch_size, rng)
    # a pack is done at expected_tokens, and never more than max_tokens
    n = min(-(-packing.expected_tokens // sample.n_tokens), packing.max_tokens // sample.n_tokens)
    return builder.collate([sample] * max(1, n), rng)


def largest_sample(builder: SampleBuilder[Any], limit: int | None, rng: random.Random) -> PackableSample:
    """The sample of the largest image that the task takes: one to generate, or else one to understand.

    limit: the most tokens of a sample. Raises ValueError where there is none.
    """
    reasons: list[str] = []
    for side in SIDES:
        image = Image.new("RGB", (side, side))
        for record in candidate_records(image):
            try:
                sample = builder.prepare(record, rng)
            except ValueError as error:
                reasons.append(str(error))
                continue
            if limit is None or sample.n_tokens <= limit:
                return sample
            reasons.append(f"an image of {side} pixels has {sample.n_tokens} tokens, more than {limit}")
    raise ValueError(f"no image fits the recipe: {reasons[-1] if reasons else 'none was tried'}")


def candidate_records(image: Image.Image) -> Sequence[Record]:
    """A record that generates an image from a caption, and one that answers about it."""
    answer = RecordText(wordings=(CAPTION,), loss=True, role="assistant")
    return (
        Record(parts=(RecordText(wordings=(CAPTION,)), RecordImage(data=image, loss=True)), source="a plan", row=0),
        Record(parts=(RecordImage(data=image), RecordText(wordings=("what is it?",)), answer), source="a plan", row=1),
    )
