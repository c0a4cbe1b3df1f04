"""One record that every data format becomes: texts and images in order, and which of them carry loss.

docs/data.md, "The record".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from unimm.processing.images.io import load_image, load_image_bytes, read_image_size
from unimm.tokenizers.text import check_text

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
# what a record teaches, as its parts say: to generate an image from text, or from images too; in several steps; to
# answer about images; text alone; texts and images that both carry loss
KINDS = ("generate", "edit", "multi_edit", "understand", "text", "interleaved")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RecordText:
    """A text, or several wordings of it, of which training takes one at random.

    loss: whether it is predicted. role: whose turn it is. thinking: reasoning ahead of an answer or an image, without
    the markers that a family puts around it.
    """

    wordings: tuple[str, ...]
    loss: bool = False
    role: Role = "user"
    thinking: bool = False

    def __post_init__(self) -> None:
        if not self.wordings:
            raise ValueError("got a text without wordings: expected one or more")
        if self.role not in ROLES:
            raise ValueError(f"got a text's role {self.role!r}: expected one of {', '.join(ROLES)}")
        for text in self.wordings:
            check_text(text, "a text")

    @property
    def text(self) -> str:
        """The only wording. Raises ValueError where there are several."""
        if len(self.wordings) > 1:
            raise ValueError(f"got a text of {len(self.wordings)} wordings: choose one first, by choose_wordings")
        return self.wordings[0]


@dataclass(frozen=True, kw_only=True)
class RecordImage:
    """An image, not yet decoded: a file's path, its bytes, or a PIL image.

    loss: whether it is generated. name: of the image in messages.
    """

    data: Path | bytes | Image.Image
    loss: bool = False
    name: str = "an image"

    def load(self) -> Image.Image:
        """The image in RGB, upright (`load_image`). Raises ValueError, with its name, for a missing or broken one."""
        if isinstance(self.data, bytes):
            return load_image_bytes(self.data, place=self.name)
        return load_image(self.data, place=self.name)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), of a file out of its header. Raises ValueError for a missing or broken one."""
        if isinstance(self.data, Image.Image):
            return self.data.size
        return read_image_size(self.data, place=self.name)


RecordPart = RecordText | RecordImage


@dataclass(frozen=True, kw_only=True)
class Record:
    """A row of a dataset.

    parts: texts and images in the order in which a model meets them. An edit is an image, an instruction and the image
    that it makes; several edits go on with the next instruction and image. source: the file that the row is in. row: its
    number there, from 0. edit_weights: whether an edit's loss counts more where it changed the image.
    """

    parts: tuple[RecordPart, ...]
    source: str
    row: int
    edit_weights: bool = False

    def __post_init__(self) -> None:
        if not any(part.loss for part in self.parts):
            raise ValueError("got a row in which nothing carries loss: expected an answer, or an image to generate")

    @property
    def where(self) -> str:
        """The row, for messages."""
        return f"row {self.row} of {self.source}"

    @property
    def texts(self) -> tuple[RecordText, ...]:
        """Its texts, in order."""
        return tuple(part for part in self.parts if isinstance(part, RecordText))

    @property
    def images(self) -> tuple[RecordImage, ...]:
        """Its images, in order."""
        return tuple(part for part in self.parts if isinstance(part, RecordImage))

    @property
    def instructions(self) -> tuple[RecordText, ...]:
        """The texts without loss ahead of each image to generate, but for the system's."""
        before = [(text, self.parts[i + 1 :]) for i, text in enumerate(self.parts) if isinstance(text, RecordText)]
        return tuple(
            text
            for text, after in before
            if not text.loss and text.role == "user" and any(isinstance(p, RecordImage) and p.loss for p in after)
        )

    @property
    def thinking(self) -> tuple[RecordText, ...]:
        """Its texts that are reasoning."""
        return tuple(text for text in self.texts if text.thinking)

    @property
    def kind(self) -> str:
        """One of KINDS."""
        n_generated = sum(image.loss for image in self.images)
        if n_generated and any(text.loss and not text.thinking for text in self.texts):
            return "interleaved"
        if not n_generated:
            return "understand" if self.images else "text"
        has_inputs = any(not image.loss for image in self.images)
        if n_generated > 1:
            return "multi_edit" if has_inputs else "interleaved"
        return "edit" if has_inputs else "generate"


@dataclass(frozen=True, kw_only=True)
class BrokenRow:
    """A row that is no record, and why."""

    source: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row} of {self.source}: {self.reason}"


def map_records(rows: Iterable[Record | BrokenRow], function: Callable[[Record], T]) -> Iterator[T | BrokenRow]:
    """The function of every record; a row of which it raises ValueError is a broken one, with that reason."""
    for row in rows:
        yield row if isinstance(row, BrokenRow) else apply_to_record(row, function)


def apply_to_record(record: Record, function: Callable[[Record], T]) -> T | BrokenRow:
    """The function of a record, or a broken row where it raises ValueError."""
    try:
        return function(record)
    except ValueError as error:
        return BrokenRow(source=record.source, row=record.row, reason=str(error))


def load_images_of(record: Record) -> Record:
    """The record with its images decoded. Raises ValueError for one that is missing or broken."""
    parts = [replace(part, data=part.load()) if isinstance(part, RecordImage) else part for part in record.parts]
    return replace(record, parts=tuple(parts))


def choose_wordings(record: Record, rng: random.Random) -> Record:
    """The record with one wording at random of every text."""
    parts = [
        replace(part, wordings=(rng.choice(part.wordings),)) if isinstance(part, RecordText) else part
        for part in record.parts
    ]
    return replace(record, parts=tuple(parts))


def sample_edit(record: Record, rng: random.Random) -> Record:
    """One or two steps at random of a record of several edits, as BAGEL samples them; other records as they are.

    Its images are n; the first is number i of 0 .. n - 2, the last one or two after it. Where it is two after, half of
    the time the two instructions are joined, "a. b.", with the last image as the only target; else all three images
    stay. docs/originals/bagel.md, "Training plans"; the original, where the last image of a row is
    two after, joins one instruction alone to the image before it, which is a slip.
    """
    if not is_edit_chain(record):
        return record
    images = record.parts[::2]
    texts = record.parts[1::2]
    first = rng.randrange(len(images) - 1)
    last = rng.randint(first + 1, min(first + 2, len(images) - 1))
    steps: list[RecordPart] = [replace(images[first], loss=False)]
    if last - first > 1 and rng.random() < 0.5:
        chosen = [rng.choice(text.wordings) for text in texts[first:last] if isinstance(text, RecordText)]
        joined = " ".join(f"{text.strip().removesuffix('.')}." for text in chosen)
        return replace(record, parts=(*steps, RecordText(wordings=(joined,)), images[last]))
    for i in range(first, last):
        steps += [texts[i], images[i + 1]]
    return replace(record, parts=tuple(steps))


def sample_edit_step(record: Record, rng: random.Random) -> Record:
    """One step at random of a record of several edits: the image before it, its instruction, the image that it makes.

    For families that generate one image from what comes before it. Other records stay as they are.
    """
    if not is_edit_chain(record):
        return record
    i = 2 * rng.randrange(len(record.parts) // 2)
    first, *others = record.parts[i : i + 3]
    return replace(record, parts=(replace(first, loss=False), *others))


def is_edit_chain(record: Record) -> bool:
    """Whether a record is an image, and then instructions and images to generate by turns."""
    parts = record.parts
    is_chain = len(parts) > 2 and len(parts) % 2 == 1
    images = all(isinstance(part, RecordImage) and part.loss == (i > 0) for i, part in enumerate(parts[::2]))
    return is_chain and images and all(isinstance(part, RecordText) and not part.loss for part in parts[1::2])
