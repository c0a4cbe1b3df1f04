"""Parquet files: BAGEL's of text to image and of edits, and any with columns of images and texts."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from unimm.data.records import BrokenRow, Record, RecordImage, RecordPart, RecordText
from unimm.data.sources.base import ConcatenatedFiles, files_of, import_library, record_or_broken
from unimm.data.sources.columns import column_parts, find_columns

# rows that are in memory at a time
BATCH_ROWS = 16


class ParquetSource(ConcatenatedFiles):
    """A parquet file, or a folder of them, in the order of their names; a chunk is a row group."""

    COLUMNS: ClassVar[tuple[str, ...]] = ()

    def open(self) -> None:
        self.paths = files_of(self.path, "*.parquet")
        self._chunk_ends = []
        for path in self.paths:
            with open_parquet(path) as file:
                self.check_columns(path, file.schema_arrow.names)
                groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            self._chunk_ends.append(np.cumsum(groups, dtype=np.int64))

    @property
    def file_chunk_ends(self) -> Sequence[NDArray[np.int64]]:
        return self._chunk_ends

    @property
    def columns_read(self) -> Sequence[str]:
        """The columns that rows are made of, and every file must have."""
        return self.COLUMNS

    def check_columns(self, path: Path, names: Sequence[str]) -> None:
        """Raise ValueError for columns that a file lacks."""
        if missing := [name for name in self.columns_read if name not in names]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}, as format {self.FORMAT} has: got {', '.join(names)}"
            )

    @abstractmethod
    def parts(self, row: Mapping[str, Any]) -> list[RecordPart]:
        """The parts of a row's record. Raises ValueError for a broken row."""

    def read_file(self, number: int, rows: range) -> Iterator[Record | BrokenRow]:
        ends = self._chunk_ends[number]
        first = int(np.searchsorted(ends, rows.start, side="right"))
        last = int(np.searchsorted(ends, rows.stop - 1, side="right"))
        with open_parquet(self.paths[number]) as file:
            for group in range(first, last + 1):
                start = int(ends[group - 1]) if group else 0
                inside = range(max(start, rows.start), min(int(ends[group]), rows.stop))
                yield from self._read_group(file, self.paths[number], group, start, inside)

    def _read_group(self, file: Any, path: Path, group: int, start: int, rows: range) -> Iterator[Record | BrokenRow]:
        """Yield these rows of one row group, which begins at row `start`; those that cannot be read are broken ones."""
        arrow_error = import_library("pyarrow", "parquet files").ArrowException
        at = start
        try:
            # without threads of its own, which a forked worker would lack
            columns = list(self.columns_read)
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
                for row in range(max(at, rows.start), min(at + len(batch), rows.stop)):
                    yield record_or_broken(path, row, partial(self._parts_of, batch.slice(row - at, 1)))
                at += len(batch)
                if at >= rows.stop:
                    return
        except (arrow_error, OSError) as error:
            for row in range(max(at, rows.start), rows.stop):
                yield BrokenRow(source=str(path), row=row, reason=f"cannot read row group {group}: {error}")

    def _parts_of(self, batch: Any) -> list[RecordPart]:
        return self.parts(batch.to_pylist()[0])


class BagelTextToImage(ParquetSource):
    """BAGEL's `t2i_pretrain`: `image`, a file's bytes, and `captions`, a JSON object of captions of any names."""

    FORMAT = "bagel-t2i"
    COLUMNS = ("image", "captions")

    def parts(self, row: Mapping[str, Any]) -> list[RecordPart]:
        captions = parse_captions(row["captions"])
        return [RecordText(wordings=captions), bytes_image(row["image"], "image", loss=True)]


class BagelEdits(ParquetSource):
    """BAGEL's `unified_edit`: `image_list`, bytes of two files or more, and `instruction_list`, for each edit a list of
    wordings."""

    FORMAT = "bagel-edit"
    COLUMNS = ("image_list", "instruction_list")

    def parts(self, row: Mapping[str, Any]) -> list[RecordPart]:
        images = row["image_list"]
        instructions = row["instruction_list"]
        if not isinstance(images, list) or len(images) < 2:
            n = len(images) if isinstance(images, list) else "no list of"
            raise ValueError(f"got {n} images in image_list: expected two or more")
        if not isinstance(instructions, list) or len(instructions) != len(images) - 1:
            n = len(instructions) if isinstance(instructions, list) else "no list of"
            raise ValueError(
                f"got {n} instructions for {len(images)} images: expected {len(images) - 1}, a list of wordings for each edit"
            )
        parts: list[RecordPart] = [bytes_image(images[0], f"image 1 of {len(images)}", loss=False)]
        for i, wordings in enumerate(instructions):
            parts.append(RecordText(wordings=parse_wordings(wordings, f"instruction {i + 1} of {len(instructions)}")))
            parts.append(bytes_image(images[i + 1], f"image {i + 2} of {len(images)}", loss=True))
        return parts


class Parquet(ParquetSource):
    """Parquet files with columns of images and texts, found by their usual names or named by options.columns.

    An image is a file's bytes, or {"bytes": ..., "path": ...} as `datasets` writes it.
    """

    FORMAT = "parquet"
    OPTIONS = ("columns",)

    def open(self) -> None:
        first = files_of(self.path, "*.parquet")[0]
        with open_parquet(first) as file:
            self.columns = find_columns(file.schema_arrow.names, self.options.columns, first)
        super().open()

    @property
    def columns_read(self) -> Sequence[str]:
        return self.columns.names

    def parts(self, row: Mapping[str, Any]) -> list[RecordPart]:
        return column_parts(row, self.columns, bytes_image)


def open_parquet(path: Path) -> Any:
    """A parquet file, to be closed. Raises ValueError for another file."""
    pyarrow = import_library("pyarrow", "parquet files")
    parquet = import_library("pyarrow.parquet", "parquet files")
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file: {error}; fetch or write it again") from error


def table_format(path: Path) -> str:
    """The format of parquet files with the columns of this one."""
    with open_parquet(path) as file:
        names = set(file.schema_arrow.names)
    bagels = (BagelTextToImage, BagelEdits)
    return next((one.FORMAT for one in bagels if names.issuperset(one.COLUMNS)), Parquet.FORMAT)


def bytes_image(value: Any, name: str, *, loss: bool = False) -> RecordImage:
    """The image of a file's bytes, alone or under "bytes", or of the file under "path". Raises ValueError for none."""
    if isinstance(value, dict) and not value.get("bytes") and isinstance(value.get("path"), str):
        return RecordImage(data=Path(value["path"]), loss=loss, name=name)
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes) or not value:
        raise ValueError(f"got {value!r:.40} for {name}: expected the bytes of an image file")
    return RecordImage(data=value, loss=loss, name=name)


def parse_captions(value: Any) -> tuple[str, ...]:
    """The captions of a JSON object; a blank for none, as the original has it."""
    try:
        captions = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got captions {value!r:.80}, which is no JSON: {error}") from error
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise ValueError(f"got captions {value!r:.80}: expected a JSON object of names and captions")
    return tuple(captions.values()) or (" ",)


def parse_wordings(value: Any, name: str) -> tuple[str, ...]:
    """The wordings of an instruction: a list of texts, or one text."""
    wordings = [value] if isinstance(value, str) else value
    if not isinstance(wordings, list) or not wordings or not all(isinstance(one, str) and one for one in wordings):
        raise ValueError(f"got {name} {value!r:.80}: expected a list of wordings")
    return tuple(wordings)
