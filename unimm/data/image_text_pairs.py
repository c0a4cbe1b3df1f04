"""Pictures with the words that they are drawn from, and the pictures: from the little world, or from files of one's own."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL import Image

from unimm.data.batching import sample_tasks
from unimm.data.shapes import Example, example
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.processing.images.io import CropSquare, load_image

RECONSTRUCTION = "reconstruct"  # a task: the picture that is shown, without a word
RECONSTRUCTION_TASK = "draw.scene"  # whose pictures it shows


@dataclass(frozen=True, kw_only=True)
class ImageTextPair:
    """What is drawn, the words and the pictures that it is drawn from, and the kind of task: draw, edit or reason."""

    kind: str
    text: str
    images: tuple[Image.Image, ...]
    target: Image.Image


class PairSource(Protocol):
    """Where pairs come from: a pure function of the step."""

    def __call__(self, step: int, size: int, rng: random.Random) -> list[ImageTextPair]: ...


@dataclass(frozen=True, kw_only=True)
class ShapesPairs:
    """Drawings and edits of the little world, every task as often as said, what is left by these weights."""

    tasks: Mapping[str, int]
    # the part of things whose colour, or whose shape, has no name
    novel_colours: float
    novel_shapes: float
    seed: int

    def __call__(self, step: int, size: int, rng: random.Random) -> list[ImageTextPair]:
        tasks = sample_tasks(self.tasks, size, rng)
        return [self.training_pair(task, step * size + i, rng) for i, task in enumerate(tasks)]

    def training_pair(self, task: str, index: int, rng: random.Random) -> ImageTextPair:
        """A training example. Raises ValueError for a task that draws nothing."""
        one = example(RECONSTRUCTION_TASK if task == RECONSTRUCTION else task, index, seed=self.seed)
        if one.target is None:
            raise ValueError(
                f"got the task {task}, which draws nothing: the reader is frozen; expected drawings and edits"
            )
        if task == RECONSTRUCTION:
            picture = Image.fromarray(one.target)
            return ImageTextPair(kind="edit", text="", images=(picture,), target=picture)
        return self.from_example(
            augment_novel_attributes(one, rng, colours=self.novel_colours, shapes=self.novel_shapes)
        )

    def from_example(self, source: Example) -> ImageTextPair:
        """An example with a target."""
        assert source.target is not None, f"{source.task} draws nothing"
        shown = tuple(Image.fromarray(image) for image in source.images)
        return ImageTextPair(
            kind=source.task.split(".")[0], text=source.prompt, images=shown, target=Image.fromarray(source.target)
        )


@dataclass(frozen=True, kw_only=True)
class FilePairs:
    """Pairs named by the lines of a JSON file, `{"target": FILE, "text": WORDS, "images": [FILES]}`, drawn with replacement.

    Files lie below the folder of the list; text and images may be left out. Targets are resized and cropped to a square.
    """

    path: Path
    image_size: int

    def __call__(self, step: int, size: int, rng: random.Random) -> list[ImageTextPair]:
        return [self.from_line(rng.choice(self.records)) for _ in range(size)]

    @cached_property
    def records(self) -> Sequence[Mapping]:
        """What the file says. Raises ValueError for a file that is missing, empty, or says something else."""
        if not self.path.is_file():
            raise ValueError(f"got data {self.path}: expected a file of JSON lines, each with a target")
        found = []
        for i, line in enumerate(self.path.read_text(encoding="utf-8").splitlines()):
            try:
                one = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {i + 1} of {self.path} is no JSON: {error}") from error
            if not isinstance(one, dict) or "target" not in one or not one.keys() <= {"target", "text", "images"}:
                raise ValueError(
                    f"got {line[:80]} in line {i + 1} of {self.path}: expected target, perhaps text and images"
                )
            if not (one.get("text") or one.get("images")):
                raise ValueError(f"line {i + 1} of {self.path} has neither text nor images to draw from")
            found.append(one)
        if not found:
            raise ValueError(f"{self.path} is empty: expected a line for each picture to draw")
        return found

    def from_line(self, line: Mapping) -> ImageTextPair:
        """The pair that a line names."""
        shown = tuple(load_image(self.path.parent / name) for name in line.get("images", ()))
        target = CropSquare(self.image_size)(load_image(self.path.parent / line["target"]))
        return ImageTextPair(kind="edit" if shown else "draw", text=line.get("text", ""), images=shown, target=target)
