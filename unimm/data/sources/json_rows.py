"""Rows of JSON files, of lines or of one list, found by their places in the file and read one at a time."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from unimm.checkpoint.contents import describe_unreadable
from unimm.data.records import BrokenRow, Record, RecordPart
from unimm.data.sources.base import DataSource, single_rows

# blanks between the values of a JSON file
BLANKS = " \t\n\r"
# of a file, one of which must be whole where the columns are to be found
FIRST_ROWS = 100


class JsonRows:
    """The rows of a file of JSON lines (.jsonl), or of one list (.json): only their places are kept in memory.

    Raises ValueError for a file that is missing, and for a .json that holds no list of objects.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"cannot read {path}: {describe_unreadable(path) or 'no such file'}")
        self.path = path
        # where each row starts and ends, in bytes
        self.places = index_list(path) if path.suffix == ".json" else index_lines(path)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, rows: range) -> Iterator[tuple[int, bytes]]:
        """Yield these rows, each with its number."""
        with self.path.open("rb") as file:
            for row in rows:
                start, end = self.places[row]
                file.seek(int(start))
                yield row, file.read(int(end - start))

    def first(self) -> Mapping[str, Any]:
        """The first row that is a JSON object, by which columns are found. Raises ValueError for none among the first
        FIRST_ROWS."""
        if not len(self):
            raise ValueError(f"{self.path} is empty: expected a row or more")
        tried = [data for _, data in self.read(range(min(FIRST_ROWS, len(self))))]
        for data in tried:
            with suppress(ValueError):
                return parse_object(data)
        raise ValueError(
            f"none of the first {len(tried)} rows of {self.path} is a JSON object: {preview(tried[0])}, ..."
        )


class JsonSource(DataSource):
    """A dataset in one file of JSON."""

    # a key that rows have
    KEY: ClassVar[str | None] = None

    def open(self) -> None:
        self.rows = JsonRows(self.path)
        if self.KEY is not None and self.KEY not in (first := self.rows.first()):
            raise ValueError(
                f"the rows of {self.path} have {', '.join(first) or 'nothing'}: expected {self.KEY}, as format {self.FORMAT}"
            )

    @property
    def chunk_ends(self) -> NDArray[np.int64]:
        return single_rows(len(self.rows))

    @abstractmethod
    def parts(self, row: int, data: bytes) -> list[RecordPart]:
        """The parts of a row's record. Raises ValueError for a broken row."""

    def record(self, row: int, data: bytes) -> Record:
        """A row's record. Raises ValueError for a broken row."""
        return Record(parts=tuple(self.parts(row, data)), source=str(self.rows.path), row=row)

    def read(self, rows: range) -> Iterator[Record | BrokenRow]:
        self.check_rows(rows)
        for row, data in self.rows.read(rows):
            try:
                made: Record | BrokenRow = self.record(row, data)
            except ValueError as error:
                made = BrokenRow(source=str(self.rows.path), row=row, reason=str(error))
            yield made


def parse_object(data: bytes) -> Mapping[str, Any]:
    """The JSON object that a row holds. Raises ValueError for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {preview(data)}, which is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"got {preview(data)}: expected a JSON object")
    return value


def preview(data: bytes) -> str:
    """The beginning of a row, for messages."""
    return ascii(data[:60].decode(errors="replace"))


def index_lines(path: Path) -> NDArray[np.int64]:
    """Where the lines of a file start and end [n, 2], without blank ones at its end, which are no broken rows.

    They end at newlines alone: JSON does not escape U+2028.
    """
    with path.open("rb") as file:
        # a blank line's is negative
        lengths = np.fromiter((-len(line) if line.isspace() else len(line) for line in file), dtype=np.int64)
    n_lines = np.flatnonzero(lengths > 0).max(initial=-1) + 1
    lengths = np.abs(lengths[:n_lines])
    ends = lengths.cumsum()
    return np.stack([ends - lengths, ends], axis=1)


def index_list(path: Path) -> NDArray[np.int64]:
    """Where the values of a file's JSON list start and end [n, 2]. Raises ValueError for another file."""
    # a byte a character, so that places are those in the file; signs of JSON are the same in both
    text = path.read_bytes().decode("latin-1").removeprefix("\xef\xbb\xbf")
    removed = path.stat().st_size - len(text)
    decoder = json.JSONDecoder()
    places: list[tuple[int, int]] = []
    at = _skip(text, 0, path, "[")
    while text[at : at + 1] != "]" or places:
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"value {len(places)} of the list in {path} is no JSON: {error}; correct it") from error
        places.append((at + removed, end + removed))
        at = _blanks(text, end)
        if text[at : at + 1] == "]":
            break
        at = _skip(text, at, path, ",")
    if rest := text[_blanks(text, at + 1) :]:
        raise ValueError(f"{path} goes on behind its list with {rest[:40]!r}: expected one JSON list")
    return np.array(places, dtype=np.int64).reshape(-1, 2)


def _blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in BLANKS:
        at += 1
    return at


def _skip(text: str, at: int, path: Path, sign: str) -> int:
    """The place of the next value behind a sign. Raises ValueError where another one stands."""
    at = _blanks(text, at)
    if text[at : at + 1] != sign:
        got = ascii(text[at : at + 40]) if text[at:] else "its end"
        raise ValueError(f"got {got} at byte {at} of {path}: expected {sign!r}, in a JSON list of objects")
    return _blanks(text, at + 1)
