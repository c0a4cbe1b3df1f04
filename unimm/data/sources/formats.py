"""Formats of datasets by name, and which one a path is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from unimm.data.sources.base import DataSource, SourceOptions, files_of
from unimm.data.sources.columns import ImageFolder, PairLines, RecordLines
from unimm.data.sources.conversations import BagelConversations, LlavaConversations, UniWorldConversations
from unimm.data.sources.huggingface import HuggingFaceDataset
from unimm.data.sources.json_rows import JsonRows
from unimm.data.sources.tables import BagelEdits, BagelTextToImage, Parquet, table_format
from unimm.data.sources.tars import WebDataset

FORMATS: Mapping[str, type[DataSource]] = {
    source.FORMAT: source
    for source in (
        BagelConversations,
        BagelEdits,
        BagelTextToImage,
        HuggingFaceDataset,
        ImageFolder,
        LlavaConversations,
        PairLines,
        Parquet,
        RecordLines,
        UniWorldConversations,
        WebDataset,
    )
}
# the key of a row of JSON lines -> its format
JSON_LINES = {
    "conversations": "bagel-vlm",
    "parts": "records",
    "target": "pairs",
    "file_name": "imagefolder",
}
# a file in a folder -> its format
FOLDER_FILES = {
    "metadata.jsonl": "imagefolder",
    "dataset_info.json": "huggingface",
    "dataset_dict.json": "huggingface",
}
SUFFIXES = {".txt": "uniworld", ".json": "llava", ".tar": "webdataset"}
EXPECTED = (
    "expected .jsonl (rows with conversations, parts, target or file_name), .json (a list of conversations), .txt "
    "(UniWorld's data.txt), .parquet, .tar, or a folder with metadata.jsonl, *.parquet, *.tar, or what "
    "datasets.save_to_disk writes; name it by format, one of {formats}"
)


def open_source(path: str | Path, *, format: str | None = None, options: SourceOptions | None = None) -> DataSource:  # noqa: A002
    """The dataset at a path, whose format is recognised or named.

    Raises ValueError for a path that is missing, for a format that is unknown or that several things speak for, for
    options that the format does not take, and for what the format finds wrong at once.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"no dataset at {path}: expected a file or a folder")
    if format is not None and format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: expected one of {', '.join(sorted(FORMATS))}")
    source = FORMATS[format or recognise_format(path)]
    options = options or SourceOptions()
    given = [field.name for field in fields(options) if getattr(options, field.name) is not None]
    if wrong := [name for name in given if name not in source.OPTIONS]:
        takes = ", ".join(source.OPTIONS) or "none"
        raise ValueError(f"got {', '.join(wrong)} for {path} of format {source.FORMAT}: it takes {takes}")
    return source(path, options)


def recognise_format(path: Path) -> str:
    """The name of a path's format, by its extension and its first row. Raises ValueError where it is not clear."""
    found = _folder_formats(path) if path.is_dir() else _file_formats(path)
    if len(found) != 1:
        what = f"more than one thing to read: {'; '.join(found)}" if found else "no dataset that is known"
        raise ValueError(f"{path} holds {what}: {EXPECTED.format(formats=', '.join(sorted(FORMATS)))}")
    return next(iter(found.values()))


def _folder_formats(folder: Path) -> dict[str, str]:
    """What speaks for a format in a folder -> the format."""
    found = {name: made for name, made in FOLDER_FILES.items() if (folder / name).is_file()}
    if tars := files_of(folder, "*.tar", required=False):
        found[tars[0].name] = "webdataset"
    if tables := files_of(folder, "*.parquet", required=False):
        found[tables[0].name] = table_format(tables[0])
    return found


def _file_formats(path: Path) -> dict[str, str]:
    """What speaks for a format in a file -> the format."""
    if path.suffix == ".jsonl":
        first = JsonRows(path).first()
        return {key: name for key, name in JSON_LINES.items() if key in first}
    if path.suffix == ".parquet":
        return {path.name: table_format(path)}
    return {path.suffix: SUFFIXES[path.suffix]} if path.suffix in SUFFIXES else {}
