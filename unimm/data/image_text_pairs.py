"""Images of the shapes world to generate, with the text and the images that they are generated from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from unimm.data.batching import sample_tasks
from unimm.data.shapes import Example, example
from unimm.data.shapes.novel_attributes import augment_novel_attributes

# a task: the input image again, without a word of text
RECONSTRUCTION = "reconstruct"
# the task whose images are reconstructed
RECONSTRUCTION_TASK = "draw.scene"


@dataclass(frozen=True, kw_only=True)
class ImageTextPair:
    """A target image, the text and the images it is generated from, and the kind of task: draw, edit or reason."""

    kind: str
    text: str
    images: tuple[Image.Image, ...]
    target: Image.Image


@dataclass(frozen=True, kw_only=True)
class ShapesPairs:
    """Pairs of the shapes world, of the tasks as `sample_tasks` gives them."""

    tasks: Mapping[str, int]
    # the part of things whose colour, or whose shape, is novel
    novel_colours: float
    novel_shapes: float
    seed: int

    def __call__(self, step: int, size: int, rng: random.Random) -> list[ImageTextPair]:
        tasks = sample_tasks(self.tasks, size, rng)
        return [self.training_pair(task, step * size + i, rng) for i, task in enumerate(tasks)]

    def training_pair(self, task: str, index: int, rng: random.Random) -> ImageTextPair:
        """A training pair. Raises ValueError for a task whose output is no image."""
        one = example(RECONSTRUCTION_TASK if task == RECONSTRUCTION else task, index, seed=self.seed)
        if one.target is None:
            raise ValueError(
                f"got the task {task}, which generates no image: the MLLM is frozen; expected draw, edit or reason"
            )
        if task == RECONSTRUCTION:
            image = Image.fromarray(one.target)
            return ImageTextPair(kind="edit", text="", images=(image,), target=image)
        one = augment_novel_attributes(one, rng, colours=self.novel_colours, shapes=self.novel_shapes)
        return self.from_example(one)

    def from_example(self, source: Example) -> ImageTextPair:
        """An example with a target, as a pair."""
        assert source.target is not None, f"{source.task} generates no image"
        return ImageTextPair(
            kind=source.task.split(".")[0],
            text=source.prompt,
            images=tuple(Image.fromarray(image) for image in source.images),
            target=Image.fromarray(source.target),
        )
