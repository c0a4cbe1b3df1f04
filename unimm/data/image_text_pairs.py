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

from unimm.data.batching import dealt
from unimm.data.shapes import Example, example
from unimm.data.shapes.novel_attributes import unnamed
from unimm.processing.images.io import CropSquare, open_image

AGAIN = "again"  # a task: the picture that is shown, without a word
SCENES = "draw.scene"  # whose pictures it shows


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is drawn, the words and the pictures that it is drawn from, and the kind of task: draw, edit or reason."""

    kind: str
    words: str
    shown: tuple[Image.Image, ...]
    target: Image.Image


class Pairs(Protocol):
    """Where pairs come from: a pure function of the step."""

    def __call__(self, step: int, size: int, dice: random.Random) -> list[Pair]: ...


@dataclass(frozen=True, kw_only=True)
class WorldPairs:
    """Drawings and edits of the little world, every task as often as said, what is left by these weights."""

    tasks: Mapping[str, int]
    # the part of things whose colour, or whose shape, has no name
    nameless_colours: float
    nameless_shapes: float
    seed: int

    def __call__(self, step: int, size: int, dice: random.Random) -> list[Pair]:
        tasks = dealt(self.tasks, size, dice)
        return [self.taken(task, step * size + i, dice) for i, task in enumerate(tasks)]

    def taken(self, task: str, index: int, dice: random.Random) -> Pair:
        """A training example. Raises ValueError for a task that draws nothing."""
        one = example(SCENES if task == AGAIN else task, index, seed=self.seed)
        if one.target is None:
            raise ValueError(
                f"got the task {task}, which draws nothing: the reader is frozen; expected drawings and edits"
            )
        if task == AGAIN:
            picture = Image.fromarray(one.target)
            return Pair(kind="edit", words="", shown=(picture,), target=picture)
        return self.pair(unnamed(one, dice, colours=self.nameless_colours, shapes=self.nameless_shapes))

    def pair(self, one: Example) -> Pair:
        """An example with a target."""
        assert one.target is not None, f"{one.task} draws nothing"
        shown = tuple(Image.fromarray(image) for image in one.images)
        return Pair(kind=one.task.split(".")[0], words=one.prompt, shown=shown, target=Image.fromarray(one.target))


@dataclass(frozen=True, kw_only=True)
class FilePairs:
    """Pairs named by the lines of a JSON file, `{"target": FILE, "text": WORDS, "images": [FILES]}`, drawn with replacement.

    Files lie below the folder of the list; text and images may be left out. Targets are resized and cropped to a square.
    """

    path: Path
    side: int

    def __call__(self, step: int, size: int, dice: random.Random) -> list[Pair]:
        return [self.pair(dice.choice(self.lines)) for _ in range(size)]

    @cached_property
    def lines(self) -> Sequence[Mapping]:
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

    def pair(self, line: Mapping) -> Pair:
        """The pair that a line names."""
        shown = tuple(open_image(self.path.parent / name) for name in line.get("images", ()))
        target = CropSquare(self.side)(open_image(self.path.parent / line["target"]))
        return Pair(kind="edit" if shown else "draw", words=line.get("text", ""), shown=shown, target=target)
