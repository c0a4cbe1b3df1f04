"""Tars as webdataset writes them: the files of a row follow one another and share their name up to its first dot."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unimm.checkpoint.contents import describe_unreadable
from unimm.data.records import BrokenRow, Record, RecordImage, RecordPart, RecordText
from unimm.data.sources.base import ConcatenatedFiles, files_of, record_or_broken
from unimm.data.sources.columns import KNOWN_COLUMNS
from unimm.data.sources.json_rows import parse_object

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
# (extension, offset, bytes) of each file of a row
Members = list[tuple[str, int, int]]


class WebDataset(ConcatenatedFiles):
    """A tar, or a folder of them: of every row an image, and its text as `.txt`, or in a `.json` as caption or text.

    options.columns may name the text's key in the JSON. A chunk is a tar. An index of each tar is made as it is opened,
    so that a row is found at its place.
    """

    FORMAT = "webdataset"
    OPTIONS = ("columns",)

    def open(self) -> None:
        given = dict(self.options.columns or {})
        if given.keys() - {"text"}:
            raise ValueError(f"got columns for {', '.join(given)} of {self.path}: expected text alone, in a tar's JSON")
        self.text_keys = (given["text"],) if given else KNOWN_COLUMNS["text"]
        self.paths = files_of(self.path, "*.tar")
        self.indexes = [index_tar(path) for path in self.paths]

    @property
    def file_chunk_ends(self) -> Sequence[NDArray[np.int64]]:
        return [np.array([len(index)] if index else [], dtype=np.int64) for index in self.indexes]

    def read_file(self, number: int, rows: range) -> Iterator[Record | BrokenRow]:
        with self.paths[number].open("rb") as file:
            for row in rows:
                members = self.indexes[number][row]
                contents = []
                for extension, offset, size in members:
                    file.seek(offset)
                    contents.append((extension, file.read(size)))
                yield record_or_broken(self.paths[number], row, partial(self.parts, contents))

    def parts(self, members: Sequence[tuple[str, bytes]]) -> list[RecordPart]:
        """The text and the image of a row's files. Raises ValueError for none, and for several."""
        names = [extension for extension, _ in members]
        images = [(extension, data) for extension, data in members if extension in IMAGE_EXTENSIONS]
        if len(images) != 1 or len(set(names)) != len(names):
            raise ValueError(f"got the files {', '.join(names)}: expected one image, and a text as txt or json")
        (extension, data) = images[0]
        text = self._text(dict(members), names)
        return [RecordText(wordings=(text,)), RecordImage(data=data, loss=True, name=f"the {extension}")]

    def _text(self, members: Mapping[str, bytes], names: Sequence[str]) -> str:
        if "txt" in members:
            return members["txt"].decode("utf-8").strip()
        contents: Mapping[str, Any] = parse_object(members["json"]) if "json" in members else {}
        found = next((contents[key] for key in self.text_keys if key in contents), None)
        if not isinstance(found, str):
            keys = f" and the keys {', '.join(contents)} in the json" if contents else ""
            raise ValueError(
                f"got the files {', '.join(names)}{keys}: expected a text as txt, or in the json as "
                f"{' or '.join(self.text_keys)}"
            )
        return found


def index_tar(path: Path) -> list[Members]:
    """The files of each row of a tar. Raises ValueError for a file that is no tar, compressed, or cut short."""
    rows: list[Members] = []
    key = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not member.isreg() or not stem:  # folders, links, hidden files
                    continue
                if (folder, stem) != key:
                    rows.append([])
                    key = (folder, stem)
                rows[-1].append((extension.lower(), member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError) as error:
        what = describe_unreadable(path) or "write it again"
        raise ValueError(f"{path} is no whole tar: {error}; {what}") from error
    if rows and sum(rows[-1][-1][1:]) > path.stat().st_size:
        raise ValueError(f"{path} is cut short: its last file goes on behind its end; write it again")
    return rows
