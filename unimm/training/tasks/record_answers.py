"""Answers of records as labelled conversations: the half of reading records that every family that chats shares."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import groupby
from typing import ClassVar, Protocol, TypeVar

from PIL import Image

from unimm.data.records import Record, RecordImage, RecordPart, RecordText, choose_wordings
from unimm.processing.chat_templates import ChatMessage
from unimm.sequence.parts import Part
from unimm.training.tasks.generation_request import join_pieces, load_pieces, split_system

# kinds of records that are answered in words
ANSWERED_KINDS = ("understand", "text")


class AnswerProcessor(Protocol):
    """What a family's processor makes of conversations to learn."""

    # follows each image that stands in front of a text
    IMAGE_SEPARATOR: ClassVar[str]

    def labelled_conversation(
        self, messages: Sequence[ChatMessage], *, learned: Collection[int], system: str | None = None
    ) -> list[Part]:
        """A whole conversation, in which some answers, and the id that ends each, carry labels."""

    def labelled_texts(self, pieces: Sequence[str | Image.Image]) -> list[Part]:
        """Texts and images in order, without roles; the ids of all texts carry labels, and the one that ends the last."""


def answer_parts(record: Record, rng: random.Random, processor: AnswerProcessor) -> list[Part]:
    """The parts of a record that is answered in words, with one wording of each text; texts and images that nobody says
    stand as they are, without roles.

    Raises ValueError for a conversation that begins with an answer, and for images that are missing or broken.
    """
    system, others = split_system(choose_wordings(record, rng).parts)
    if not system and all(part.loss for part in others if isinstance(part, RecordText)):
        return processor.labelled_texts(load_pieces([written(part) for part in others]))
    messages, learned = chat_messages(others, around_images=processor.IMAGE_SEPARATOR)
    return processor.labelled_conversation(messages, learned=learned, system=system or None)


Written = TypeVar("Written", bound=RecordPart)


def written(part: Written) -> Written:
    """A part; reasoning between <think> and </think>, as datasets write it."""
    if not isinstance(part, RecordText) or not part.thinking:
        return part
    return replace(part, wordings=(f"<think>{part.text.strip()}</think>",), thinking=False)


def chat_messages(parts: Sequence[RecordPart], *, around_images: str) -> tuple[list[ChatMessage], list[int]]:
    """Messages of the user's and the assistant's by turns, and the places of those that carry loss.

    Texts and images that follow one another on one side are one message. Raises ValueError for a conversation that
    begins with an answer.
    """
    messages = []
    learned = []
    for role, turn in groupby(parts, _speaker):
        said = [written(part) for part in turn]
        pieces = load_pieces(said)
        if role == "user":
            messages.append(ChatMessage(role, join_pieces(pieces, around_images=around_images)))
            continue
        if any(part.loss for part in said):
            learned.append(len(messages))
        messages.append(ChatMessage(role, ["".join(piece for piece in pieces if isinstance(piece, str))]))
    if messages[0].role != "user":
        raise ValueError(
            "got a conversation that begins with an answer: expected the user's words, or images, before it"
        )
    return messages[: learned[-1] + 1], learned


def _speaker(part: RecordPart) -> str:
    return "user" if isinstance(part, RecordImage) or not (part.loss or part.role == "assistant") else "assistant"
