"""What an image of a record is generated from: the half of reading records that every family that generates shares."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from PIL import Image

from unimm.data.records import Record, RecordImage, RecordPart, RecordText, choose_wordings, sample_edit_step
from unimm.training.config import TrainConfig

# kinds of records whose last part is an image to generate; one step of a "multi_edit" is an "edit"
GENERATED_KINDS = ("generate", "edit")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """An image to generate, with the texts and decoded images that it is generated from, in order.

    kind: "generate" or "edit". system: of a record that has a system prompt, "" for none.
    """

    kind: str
    system: str
    pieces: Sequence[str | Image.Image]
    target: RecordImage

    @property
    def text(self) -> str:
        """Its texts, a line each."""
        return "\n".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def images(self) -> list[Image.Image]:
        """Its images, in order."""
        return [piece for piece in self.pieces if isinstance(piece, Image.Image)]

    @classmethod
    def from_record(cls, record: Record, rng: random.Random, *, family: str) -> GenerationRequest:
        """What a record generates, with one wording of each text, and one step of several edits.

        Raises ValueError for a record that ends with no image to generate, or carries loss on anything else; for one
        with reasoning; and for images that are missing or broken. family: for the message.
        """
        record = sample_edit_step(record, rng)
        check_kind(record, GENERATED_KINDS, family=family)
        if record.thinking:
            raise ValueError(f"got reasoning ahead of an image: {family} does not think before it generates")
        *before, target = choose_wordings(record, rng).parts
        if not isinstance(target, RecordImage):
            raise ValueError(f"got a text behind the image to generate: {family} expects the image as the last part")
        system, others = split_system(before)
        pieces = load_pieces(others)
        if not pieces:
            raise ValueError(
                "got an image to generate without a text or an image: expected something to generate it from"
            )
        return cls(kind=record.kind, system=system, pieces=pieces, target=target)


def check_kind(record: Record, kinds: Collection[str], *, family: str) -> None:
    """Raise ValueError for a record that a family cannot learn. kinds: those that it can."""
    if record.kind not in kinds:
        raise ValueError(
            f"got a record of the kind {record.kind}, which {family} does not learn: expected {', '.join(kinds)}"
        )


def split_system(parts: Sequence[RecordPart]) -> tuple[str, list[RecordPart]]:
    """The system prompt that a record begins with, "" for none, and its other parts.

    Raises ValueError for a system's text further on.
    """
    n = next((i for i, part in enumerate(parts) if not is_system(part)), len(parts))
    if any(is_system(part) for part in parts[n:]):
        raise ValueError("got a system prompt behind another part: expected it at the start")
    return "\n".join(part.text for part in parts[:n] if isinstance(part, RecordText)), list(parts[n:])


def is_system(part: RecordPart) -> bool:
    """Whether a part is the system's."""
    return isinstance(part, RecordText) and part.role == "system"


def load_pieces(parts: Sequence[RecordPart]) -> list[str | Image.Image]:
    """The texts and decoded images of parts, without texts of white space alone. Raises ValueError for broken images."""
    pieces = [part.load() if isinstance(part, RecordImage) else part.text.strip() for part in parts]
    return [piece for piece in pieces if piece != ""]


def join_pieces(pieces: Sequence[str | Image.Image], *, around_images: str = "\n") -> list[str | Image.Image]:
    """A message of these texts and images, each text on a line of its own; around_images: what stands between a text, or
    an image, and an image."""
    joined: list[str | Image.Image] = []
    for piece in pieces:
        between = "\n" if joined and isinstance(piece, str) and isinstance(joined[-1], str) else around_images
        joined += [between, piece] if joined and between else [piece]
    return joined


def check_pack_limit(tokens_per_image: int, recipe: TrainConfig) -> None:
    """Raise ValueError for packs that no image to generate fits into, whose tokens are so many."""
    if recipe.packing is not None and recipe.packing.max_tokens_per_sample <= tokens_per_image:
        raise ValueError(
            f"got packing.max_tokens_per_sample {recipe.packing.max_tokens_per_sample}, and an image to generate of "
            f"{tokens_per_image} tokens: every one would be left out; expected more, for its prompt, too"
        )
