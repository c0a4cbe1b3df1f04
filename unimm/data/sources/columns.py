"""Rows whose columns are an image and its text: which columns they are, and the record that they make."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from unimm.data.records import Record, RecordImage, RecordPart, RecordText
from unimm.data.sources.json_rows import JsonRows, JsonSource, parse_object, preview
from unimm.tokenizers.text import check_text

# what a column is for -> names that it is known by, unless options.columns names it
KNOWN_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "target": ("target", "target_image", "output_image", "edited_image", "image", "jpg", "png"),
    "images": ("images", "source_images", "input_images", "input_image", "source_image", "original_image"),
    "text": ("text", "caption", "captions", "prompt", "instruction", "edit_prompt"),
    "thinking": ("thinking",),
    "answer": ("answer",),
}
ToImage = Callable[[Any, str], RecordImage]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of a dataset's columns: of the image to generate, of the images that it is made from, of the text, of
    the reasoning ahead of the image or the answer, and of an answer about the images in place of one to generate."""

    target: str | None = None
    images: str | None = None
    text: str | None = None
    thinking: str | None = None
    answer: str | None = None

    @property
    def names(self) -> list[str]:
        """The names of those that there are."""
        return [name for field in fields(self) if (name := getattr(self, field.name)) is not None]


def find_columns(names: Iterable[str], given: Mapping[str, str] | None, where: Path) -> Columns:
    """The columns among a dataset's names: those that are given, and the others by their usual names.

    Raises ValueError for a column that is missing, for a use that there is not, and where several would do.
    """
    names = list(names)
    given = given or {}
    if unknown := sorted(given.keys() - KNOWN_COLUMNS.keys()):
        raise ValueError(f"got columns for {', '.join(unknown)}: expected some of {', '.join(KNOWN_COLUMNS)}")
    if missing := [f"{use}={name}" for use, name in given.items() if name not in names]:
        raise ValueError(f"{where} has no column {', '.join(missing)}: expected some of its {', '.join(names)}")
    left = [name for name in names if name not in given.values()]
    found = {use: given.get(use) or _known(use, left, where) for use in KNOWN_COLUMNS}
    if found["answer"] and not found["images"]:  # an image that is asked about is none to generate
        found |= {"images": found["target"], "target": None}
    if found["answer"] and found["target"]:
        raise ValueError(f"{where} has an answer and an image to generate: name one of them alone in columns")
    if not (found["target"] or found["answer"]) or not (found["text"] or found["images"]):
        raise ValueError(
            f"{where} has the columns {', '.join(names)}: expected an image and a text under usual names, or which they are "
            f"in columns, as in columns=target=image,text=caption; the uses are {', '.join(KNOWN_COLUMNS)}"
        )
    return Columns(**found)


def _known(use: str, names: Sequence[str], where: Path) -> str | None:
    found = [name for name in KNOWN_COLUMNS[use] if name in names]
    if len(found) > 1 and use in ("text", "target"):
        raise ValueError(f"{where} has the columns {', '.join(found)}: say which one is {use}, by columns={use}=NAME")
    return found[0] if found else None


def column_parts(row: Mapping[str, Any], columns: Columns, to_image: ToImage) -> list[RecordPart]:
    """Images, text, reasoning, and the image to generate or the answer. to_image: makes an image of a column's value.

    A list of texts is several wordings. Raises ValueError for a value that is missing or of another type.
    """
    parts: list[RecordPart] = []
    inputs = row.get(columns.images) if columns.images else None
    inputs = [] if inputs is None else inputs
    for i, value in enumerate(inputs if isinstance(inputs, list) else [inputs]):
        parts.append(to_image(value, f"image {i + 1} of {columns.images}"))
    if columns.text and (text := row.get(columns.text)):
        parts.append(RecordText(wordings=_texts(text, columns.text)))
    if not parts:
        raise ValueError("got a row with neither text nor images: expected one of them to begin from")
    if columns.thinking and (thinking := row.get(columns.thinking)):
        wordings = _texts(thinking, columns.thinking)
        parts.append(RecordText(wordings=wordings, loss=True, role="assistant", thinking=True))
    if columns.answer:
        wordings = _texts(row.get(columns.answer), columns.answer)
        return [*parts, RecordText(wordings=wordings, loss=True, role="assistant")]
    name = columns.target or "target"
    return [*parts, replace(to_image(row.get(name), name), loss=True)]


def _texts(value: Any, name: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"got {name} {value!r:.80}: expected a text, or a list of texts")
    return tuple(texts)


def file_image(folder: Path, value: Any, name: str) -> RecordImage:
    """The image of a file that a column names."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"got {name} {value!r:.80}: expected the name of a file")
    return RecordImage(data=folder / value, name=name)


class ImageFolder(JsonSource):
    """A folder of images with a metadata.jsonl, `{"file_name": NAME, "text": TEXT}`, as `datasets` and diffusers have it.

    options.columns may name other columns, and images that the image is made from. `path` is the folder or the file.
    """

    FORMAT = "imagefolder"
    OPTIONS = ("columns",)

    def open(self) -> None:
        self.rows = JsonRows(self.path / "metadata.jsonl" if self.path.is_dir() else self.path)
        first = self.rows.first()
        given = dict(self.options.columns or {})
        if "file_name" in first and "file_name" not in given.values():
            # an image that is asked about is none to generate
            given.setdefault("images" if "answer" in {*given, *first} else "target", "file_name")
        self.columns = find_columns(first, given, self.rows.path)

    def parts(self, row: int, data: bytes) -> list[RecordPart]:
        return column_parts(parse_object(data), self.columns, partial(file_image, self.rows.path.parent))


class PairLines(JsonSource):
    """JSON lines of images to generate, `{"target": FILE, "text": TEXT, "images": [FILES]}`; text or images may be left
    out."""

    FORMAT = "pairs"
    KEY = "target"
    COLUMNS = Columns(target="target", text="text", images="images")

    def parts(self, row: int, data: bytes) -> list[RecordPart]:
        pair = parse_pair(data.decode(), row + 1, self.path)
        return column_parts(pair, self.COLUMNS, partial(file_image, self.path.parent))


def parse_pair(line: str, number: int, path: Path) -> Mapping:
    """The contents of a line `{"target": FILE, "text": TEXT, "images": [FILES]}` of a JSON file, where text and images
    may be left out or null. Raises ValueError, with its number, for a wrong one."""
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


class RecordLines(JsonSource):
    """JSON lines of records as they are: `{"parts": [{"text": TEXT or [WORDINGS]}, {"image": FILE, "loss": true}, ...]}`.

    A part may have `loss`, and a text `role` and `thinking`; a row may have `edit_weights`.
    """

    FORMAT = "records"
    KEY = "parts"

    def record(self, row: int, data: bytes) -> Record:
        weighted = parse_object(data).get("edit_weights", False)
        if type(weighted) is not bool:
            raise ValueError(f"got edit_weights {weighted!r:.80}: expected true or false")
        return replace(super().record(row, data), edit_weights=weighted)

    def parts(self, row: int, data: bytes) -> list[RecordPart]:
        contents = parse_object(data)
        parts = contents.get("parts")
        if not isinstance(parts, list) or not contents.keys() <= {"parts", "edit_weights"}:
            raise ValueError(f"got {preview(data)}: expected a list of parts, perhaps edit_weights")
        return [self._part(part) for part in parts]

    def _part(self, part: Any) -> RecordPart:
        keys = part.keys() if isinstance(part, dict) else set()
        loss = part.get("loss", False) if keys else None
        if type(loss) is bool and "image" in keys and keys <= {"image", "loss"}:
            return replace(file_image(self.path.parent, part["image"], "image"), loss=loss)
        thinking = part.get("thinking", False) if keys else None
        if type(loss) is type(thinking) is bool and "text" in keys and keys <= {"text", "loss", "role", "thinking"}:
            role = part.get("role", "assistant" if loss else "user")
            return RecordText(wordings=_texts(part["text"], "text"), loss=loss, role=role, thinking=thinking)
        raise ValueError(f"got the part {part!r:.80}: expected text, loss, role and thinking, or image and loss")
