"""Datasets that `datasets` has written to a folder, with columns of images and texts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unimm.data.records import BrokenRow, Record, RecordPart
from unimm.data.sources.base import DataSource, import_library, record_or_broken, single_rows
from unimm.data.sources.columns import column_parts, find_columns
from unimm.data.sources.tables import bytes_image


class HuggingFaceDataset(DataSource):
    """A folder that `Dataset.save_to_disk` wrote; columns are found by their usual names, or named by options.columns."""

    FORMAT = "huggingface"
    OPTIONS = ("columns",)

    def open(self) -> None:
        if (self.path / "dataset_dict.json").is_file():
            splits = sorted(one.name for one in self.path.iterdir() if one.is_dir())
            raise ValueError(
                f"{self.path} holds the splits {', '.join(splits)}: expected one, as in {self.path / splits[0]}"
            )
        self.columns = find_columns(self.dataset.column_names, self.options.columns, self.path)

    def __getstate__(self) -> dict[str, Any]:
        """Without the files that are open."""
        return {name: value for name, value in self.__dict__.items() if name != "dataset"}

    @cached_property
    def dataset(self) -> Any:
        """The dataset in Arrow's form, in which images are the bytes of their files: they are decoded as all others are."""
        datasets = import_library("datasets", "a Hugging Face dataset")
        try:
            dataset = datasets.load_from_disk(str(self.path))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"cannot read {self.path} as datasets.save_to_disk writes it: {error}") from error
        return dataset.with_format("arrow")

    @cached_property
    def chunk_ends(self) -> NDArray[np.int64]:
        return single_rows(len(self.dataset))

    def read(self, rows: range) -> Iterator[Record | BrokenRow]:
        self.check_rows(rows)
        for row in rows:
            yield record_or_broken(self.path, row, partial(self._parts, row))

    def _parts(self, row: int) -> list[RecordPart]:
        return column_parts(self.dataset[row].to_pylist()[0], self.columns, bytes_image)
