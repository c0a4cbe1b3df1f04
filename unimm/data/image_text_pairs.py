"""Images to generate, with the text and the images that they are generated from: of the shapes world, or of files."""

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
from unimm.processing.images.io import center_crop, load_image
from unimm.tokenizers.text import check_text

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


class PairSource(Protocol):
    """A source of pairs, which are a function of the step and of a generator seeded by it."""

    def __call__(self, step: int, size: int, rng: random.Random) -> list[ImageTextPair]: ...


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


@dataclass(frozen=True, kw_only=True)
class FilePairs:
    """Pairs named by the lines of a JSON file, `{"target": FILE, "text": TEXT, "images": [FILES]}`, with replacement.

    Files lie below the folder of the list; text and images may be left out or null. Targets are cropped to a square.
    """

    path: Path
    # of a target's sides, in pixels
    image_size: int

    def __call__(self, step: int, size: int, rng: random.Random) -> list[ImageTextPair]:
        return [self.from_record(rng.choice(self.records)) for _ in range(size)]

    @cached_property
    def records(self) -> Sequence[Mapping]:
        """The file's lines. Raises ValueError for a file that is missing, empty, or holds something else."""
        if not self.path.is_file():
            raise ValueError(f"got data {self.path}: expected a file of JSON lines, each with a target")
        text = self.path.read_text(encoding="utf-8").removesuffix("\n")
        if not text:
            raise ValueError(f"{self.path} is empty: expected a line for each image to generate")
        # at newlines alone: captions may hold U+2028 and other ends of lines of Unicode's, which JSON does not escape
        lines = text.split("\n")
        return [parse_pair(line, i + 1, self.path) for i, line in enumerate(lines)]

    def from_record(self, record: Mapping) -> ImageTextPair:
        """The pair that a line names."""
        images = tuple(load_image(self.path.parent / name) for name in record.get("images") or ())
        target = center_crop(load_image(self.path.parent / record["target"]), self.image_size)
        return ImageTextPair(
            kind="edit" if images else "draw", text=record.get("text") or "", images=images, target=target
        )


def parse_pair(line: str, number: int, path: Path) -> Mapping:
    """The contents of a line of `FilePairs`'s file. Raises ValueError, with its number, for a wrong one."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"line {number} of {path} is no JSON: {error}") from error
    if not isinstance(record, dict) or "target" not in record or not record.keys() <= {"target", "text", "images"}:
        raise ValueError(f"got {line[:80]} in line {number} of {path}: expected target, perhaps text and images")
    target = record["target"]
    text = record.get("text") or ""
    images = record.get("images") or []
    names = [target, *images] if isinstance(images, list) else [images]
    if not all(isinstance(name, str) and name for name in names) or not isinstance(images, list):
        raise ValueError(
            f"got target {target!r:.80}, images {images!r:.80} in line {number} of {path}: expected the name of "
            "a file, and a list of names"
        )
    check_text(text, f"the text in line {number} of {path}")
    if not (text or images):
        raise ValueError(f"line {number} of {path} has neither text nor images to generate from")
    return record
