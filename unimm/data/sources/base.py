"""A source of records: the rows of a dataset in a fixed order, read from any row on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from unimm.data.records import BrokenRow, Record, RecordPart


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How the rows of a dataset are read. A format takes those that its OPTIONS name.

    images: the folder that the names of images are relative to, in place of the format's own. columns: what a column is
    for -> its name in the dataset (unimm.data.sources.columns). video_frames: of a video, spread evenly.
    """

    images: Path | None = None
    columns: Mapping[str, str] | None = None
    video_frames: int | None = None


class DataSource(ABC):
    """The rows of a dataset, in an order that never changes.

    `read` may begin at any row, so a run that is resumed goes on at the next one; which rows a rank and a worker read
    is decided by RowOrder (unimm.data.order), in whole chunks. Making a source checks what can be checked at once:
    files that are missing, columns that are missing, files of another kind are a ValueError. A source can be pickled;
    it opens its files where it is read.
    """

    FORMAT: ClassVar[str]
    # of SourceOptions
    OPTIONS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        self.path = path
        self.options = options or SourceOptions()
        self.open()
        if not self.n_rows:
            raise ValueError(f"{path} has no rows: expected a dataset of one or more, as format {self.FORMAT}")

    @abstractmethod
    def open(self) -> None:
        """Find the files and their rows. Raises ValueError for what is missing or of another kind."""

    @property
    def n_rows(self) -> int:
        """How many rows it has, broken ones too."""
        return int(self.chunk_ends[-1]) if len(self.chunk_ends) else 0

    @property
    @abstractmethod
    def chunk_ends(self) -> NDArray[np.int64]:
        """Where each piece of rows ends that is best read whole: row groups, tars, single rows. They follow one another."""

    @abstractmethod
    def read(self, rows: range) -> Iterator[Record | BrokenRow]:
        """Yield each of these rows, which follow one another, as a record or as a broken row."""

    def check_rows(self, rows: range) -> None:
        """Raise ValueError for rows that the source does not have."""
        if rows.step != 1 or rows.start < 0 or rows.stop > self.n_rows:
            raise ValueError(f"got {rows} of {self.path}: expected rows that follow one another, within {self.n_rows}")


class ConcatenatedFiles(DataSource):
    """A dataset of several files, read one after the other."""

    @property
    @abstractmethod
    def file_chunk_ends(self) -> Sequence[NDArray[np.int64]]:
        """Of every file where its chunks end, its rows counted from 0."""

    @abstractmethod
    def read_file(self, number: int, rows: range) -> Iterator[Record | BrokenRow]:
        """Yield these rows of one file, which is given by its number."""

    @cached_property
    def starts(self) -> list[int]:
        """The number of the first row of every file, and at the end that of all rows."""
        return [0, *accumulate(int(ends[-1]) if len(ends) else 0 for ends in self.file_chunk_ends)]

    @cached_property
    def chunk_ends(self) -> NDArray[np.int64]:
        ends = [start + ends for start, ends in zip(self.starts[:-1], self.file_chunk_ends, strict=True)]
        return np.concatenate(ends) if ends else single_rows(0)

    def read(self, rows: range) -> Iterator[Record | BrokenRow]:
        self.check_rows(rows)
        for number, (start, stop) in enumerate(pairwise(self.starts)):
            inside = range(max(rows.start, start) - start, min(rows.stop, stop) - start)
            if inside:
                yield from self.read_file(number, inside)


def record_or_broken(source: Path, row: int, parts: Callable[[], Sequence[RecordPart]]) -> Record | BrokenRow:
    """A record of the parts that a function makes, or a broken row where it raises ValueError."""
    try:
        return Record(parts=tuple(parts()), source=str(source), row=row)
    except ValueError as error:
        return BrokenRow(source=str(source), row=row, reason=str(error))


def files_of(path: Path, pattern: str, *, required: bool = True) -> list[Path]:
    """A file itself, or the files below a folder of that pattern, sorted; hidden ones apart.

    required: raise ValueError for none.
    """
    found = [path] if path.is_file() else sorted(one for one in path.rglob(pattern) if one.is_file())
    files = [one for one in found if one == path or not one.name.startswith((".", "_"))]
    if required and not files:
        raise ValueError(f"no {pattern} in {path}: expected a file, or a folder of them")
    return files


def import_library(name: str, needed_for: str) -> ModuleType:
    """A library of the extra unimm[data]. Raises ValueError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"reading {needed_for} needs {name}: pip install 'unimm[data]' ({error})") from error


def single_rows(n_rows: int) -> NDArray[np.int64]:
    """The ends of chunks of one row each, where any row is read as quickly as the next."""
    return np.arange(1, n_rows + 1, dtype=np.int64)
