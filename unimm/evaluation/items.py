"""What a benchmark asks of a model: items, each with a seed of its own, in batches that depend on the items alone."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from unimm.processing.images.io import load_image

# an item's id is also the path of its image below the run's folder
_ID = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalItem:
    """One output that a benchmark asks for.

    id: unique within the benchmark. group: the task or level under which it is scored. unit: items of one group and
    unit are scored as one; unless given, each by itself. images: inputs of an edit or a question. size: (height, width)
    of its image in pixels; unless given, as the run says. output: what the model gives. answer: what a right output
    shows, in words. payload: what the benchmark's own judge needs beside these; it is not written.
    """

    id: str
    group: str
    prompt: str
    seed: int
    unit: str = ""
    images: tuple[Image.Image | Path, ...] = ()
    size: tuple[int, int] | None = None
    think: bool = False
    output: Literal["image", "text"] = "image"
    answer: str = ""
    payload: Any = None

    @property
    def unit_id(self) -> str:
        """The name of its unit, unique within the benchmark."""
        return f"{self.group}/{self.unit}" if self.unit else self.id

    def load_images(self) -> list[Image.Image]:
        """The input images. Raises ValueError, with the item's id, for one that cannot be read."""
        return [load_image(image, place=f"the input image of {self.id}") for image in self.images]


def item_seed(seed: int, benchmark: str, key: str) -> int:
    """The seed of an item's noise, 0 to 2^63 - 1, from the run's seed and from what names the item."""
    digest = hashlib.sha256(f"{benchmark}/{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_items(items: Sequence[EvalItem], benchmark: str) -> None:
    """Raise ValueError for no items, for two of one id, and for an id that is no path."""
    if not items:
        raise ValueError(f"{benchmark} has no items: expected at least one; ask for more, or for other tasks")
    seen = set()
    for item in items:
        if not _ID.fullmatch(item.id):
            raise ValueError(f"got the id {item.id!r} in {benchmark}: expected letters, digits, and . _ + - between /")
        if item.id in seen:
            raise ValueError(f"got the id {item.id} twice in {benchmark}: expected each once")
        seen.add(item.id)


def make_batches(items: Sequence[EvalItem], batch_size: int) -> list[list[EvalItem]]:
    """Items in batches, in order; those of one batch are of one group and asked for in the same way.

    They depend on the items and on `batch_size` alone: a run that is resumed or shared between processes computes the
    same batches, so its outputs are the same to the bit on one machine.
    """
    batches: list[list[EvalItem]] = []
    last = None
    for item in items:
        kind = (item.group, item.think, item.output, bool(item.images), item.size)
        if kind != last or len(batches[-1]) == batch_size:
            batches.append([])
        batches[-1].append(item)
        last = kind
    return batches


def hash_items(items: Sequence[EvalItem]) -> dict[str, str]:
    """SHA-256 of what is asked (ids, prompts, input images, seeds, modes, sizes), and of the right answers."""
    asked = [
        [one.id, one.group, one.unit, one.prompt, one.seed, one.think, one.output, [_hash_image(i) for i in one.images]]
        + ([] if one.size is None else [one.size])
        for one in items
    ]
    return {"prompts": _hash_json(asked), "answers": _hash_json([[one.id, one.answer] for one in items])}


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_image(image: Image.Image | Path) -> str:
    if isinstance(image, Path):
        if not image.is_file():
            raise ValueError(f"no image at {image}: expected an input image of the benchmark")
        return hashlib.sha256(image.read_bytes()).hexdigest()
    return hashlib.sha256(repr(image.size).encode() + image.convert("RGB").tobytes()).hexdigest()
