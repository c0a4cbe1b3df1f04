"""Conversations about images: BAGEL's JSON lines, LLaVA's JSON, and UniWorld's data.txt with its annotations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unimm.data.records import BrokenRow, Record, RecordImage, RecordPart, RecordText, Role
from unimm.data.sources.base import ConcatenatedFiles, record_or_broken, single_rows
from unimm.data.sources.json_rows import JsonRows, JsonSource, parse_object
from unimm.data.sources.video import read_frames

IMAGE_MARKER = "<image>"
VIDEO_MARKER = "<video>"
# an answer that is an image, in UniWorld's annotations
GENERATED_MARKER = "<gen_image>"
SPEAKERS: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
# the original's loader takes 8 to 12 at random
VIDEO_FRAMES = 12


class ConversationSource(JsonSource):
    """Rows of a JSON file, `{"image": NAME or [NAMES], "conversations": [{"from": "human", "value": TEXT}, ...]}`.

    Names are relative to the file's folder, or to options.images. `<image>` in a user's text stands for the next image,
    `<video>` for the frames of the row's `video`. What "gpt" says carries loss.
    """

    KEY = "conversations"
    OPTIONS = ("images", "video_frames")

    def open(self) -> None:
        super().open()
        self.folder = self.options.images or self.path.parent
        if not self.folder.is_dir():
            raise ValueError(f"no folder {self.folder}: expected the one that {self.path}'s images are relative to")

    def parts(self, row: int, data: bytes) -> list[RecordPart]:
        n_frames = self.options.video_frames or VIDEO_FRAMES
        return conversation_parts(parse_object(data), self.folder, video_frames=n_frames)


class BagelConversations(ConversationSource):
    """BAGEL's `vlm_sft`: JSON lines, and a folder of images or videos."""

    FORMAT = "bagel-vlm"


class LlavaConversations(ConversationSource):
    """LLaVA's JSON: one list of the same rows."""

    FORMAT = "llava"


class UniWorldConversations(ConcatenatedFiles):
    """UniWorld's data.txt: a line a dataset, `IMAGES,ANNOTATIONS.json,true|false`, relative to the file's folder.

    The last says whether an edit's loss counts more where it changed the image. An annotation is a conversation of
    LLaVA's in which the answer "<gen_image>" is the last image of the row.
    """

    FORMAT = "uniworld"

    def open(self) -> None:
        lines = self.path.read_text(encoding="utf-8").split("\n")
        self.datasets = [
            self._dataset(line.strip(), f"line {i + 1} of {self.path}") for i, line in enumerate(lines) if line.strip()
        ]

    @property
    def file_chunk_ends(self) -> Sequence[NDArray[np.int64]]:
        return [single_rows(len(rows)) for _, rows, _ in self.datasets]

    def read_file(self, number: int, rows: range) -> Iterator[Record | BrokenRow]:
        folder, annotations, weighted = self.datasets[number]
        for row, data in annotations.read(rows):
            made = record_or_broken(annotations.path, row, partial(_annotation_parts, data, folder))
            yield replace(made, edit_weights=weighted) if isinstance(made, Record) else made

    def _dataset(self, line: str, where: str) -> tuple[Path, JsonRows, bool]:
        """The folder of images, the annotations, and whether edits are weighted, of a line."""
        fields = [one.strip() for one in line.rsplit(",", 2)]
        if len(fields) != 3 or fields[2].lower() not in ("true", "false"):
            raise ValueError(f"got {line[:120]!r} in {where}: expected IMAGES,ANNOTATIONS.json,true or false")
        folder = self.path.parent / fields[0]
        if not folder.is_dir():
            raise ValueError(f"{where} names the folder of images {folder}, which is not there: correct the line")
        try:
            rows = JsonRows(self.path.parent / fields[1])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return folder, rows, fields[2].lower() == "true"


def conversation_parts(
    row: Mapping[str, Any], folder: Path, *, video_frames: int = VIDEO_FRAMES, generates: bool = False
) -> list[RecordPart]:
    """The parts of a conversation about images. generates: whether "<gen_image>" answers with the next image.

    Raises ValueError for keys that are missing or of another type, and where images and their markers do not agree.
    """
    turns = _turns(row)
    if row.get("video"):
        turns, images = _with_frames(row, turns, folder, video_frames)
    else:
        images = _images(row, folder)
    pieces = [piece for role, text in turns for piece in _pieces(role, text, generates=generates)]
    n_markers = sum(isinstance(piece, bool) for piece in pieces)
    if n_markers != len(images):
        markers = f"{IMAGE_MARKER} and {GENERATED_MARKER}" if generates else IMAGE_MARKER
        raise ValueError(f"got {len(images)} images and {n_markers} of {markers} in conversations: expected as many")
    left = iter(images)
    return [replace(next(left), loss=piece) if isinstance(piece, bool) else piece for piece in pieces]


def _annotation_parts(data: bytes, folder: Path) -> list[RecordPart]:
    return conversation_parts(parse_object(data), folder, generates=True)


def _turns(row: Mapping[str, Any]) -> list[tuple[Role, str]]:
    """Who says what."""
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise ValueError(f"got conversations {conversation!r:.80}: expected a list of turns")
    turns = []
    for i, turn in enumerate(conversation):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in SPEAKERS or not isinstance(text, str):
            speakers = ", ".join(SPEAKERS)
            raise ValueError(f"got turn {i} {turn!r:.80}: expected a text as value, and from, one of {speakers}")
        turns.append((SPEAKERS[speaker], text))
    return turns


def _pieces(role: Role, text: str, *, generates: bool) -> list[RecordText | bool]:
    """The texts of a turn, and a truth value for each of its images: whether it is generated."""
    if role == "assistant":
        return _answer_pieces(text, generates=generates)
    pieces: list[RecordText | bool] = []
    for i, piece in enumerate(text.split(IMAGE_MARKER)):
        pieces += [False] if i else []
        pieces += [RecordText(wordings=(piece.strip(),), role=role)] if piece.strip() else []
    return pieces


def _answer_pieces(text: str, *, generates: bool) -> list[RecordText | bool]:
    pieces: list[RecordText | bool] = []
    if found := THINKING.match(text):
        pieces.append(RecordText(wordings=(found[1].strip(),), loss=True, role="assistant", thinking=True))
        text = text[found.end() :]
    if text.strip() != GENERATED_MARKER:
        if not text.strip():
            raise ValueError("got an empty answer: expected a text")
        return [*pieces, RecordText(wordings=(text,), loss=True, role="assistant")]
    if not generates:
        raise ValueError(
            f"got the answer {GENERATED_MARKER}: expected it in annotations that a UniWorld data.txt names"
        )
    return [*pieces, True]


def _images(row: Mapping[str, Any], folder: Path) -> list[RecordImage]:
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"got image {row['image']!r:.80}: expected the name of a file, or a list of names")
    return [
        RecordImage(data=folder / name, name="the image" if len(names) == 1 else f"image {i + 1} of {len(names)}")
        for i, name in enumerate(names)
    ]


def _with_frames(
    row: Mapping[str, Any], turns: list[tuple[Role, str]], folder: Path, n_frames: int
) -> tuple[list[tuple[Role, str]], list[RecordImage]]:
    """The turns with an image's marker for each frame of the row's video, and the frames."""
    name = row["video"]
    if not isinstance(name, str) or row.get("image"):
        raise ValueError(f"got video {name!r:.80} and image {row.get('image')!r:.40}: expected one of them, a name")
    at = next((i for i, (role, text) in enumerate(turns) if role != "assistant" and VIDEO_MARKER in text), None)
    if at is None or turns[at][1].count(VIDEO_MARKER) > 1:
        raise ValueError(f"got a video: expected {VIDEO_MARKER} once, in a turn of the user's")
    frames = read_frames(folder / name, n_frames)
    role, text = turns[at]
    turns = [*turns[:at], (role, text.replace(VIDEO_MARKER, IMAGE_MARKER * len(frames))), *turns[at + 1 :]]
    return turns, [RecordImage(data=frame, name=f"frame {i + 1} of {name}") for i, frame in enumerate(frames)]
