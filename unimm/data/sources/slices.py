"""A part of a dataset as a dataset: what is trained on, and what is held out of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from unimm.data.records import BrokenRow, Record
from unimm.data.sources.base import DataSource


class SourceSlice(DataSource):
    """Some rows of a source, which follow one another. Records and messages have the rows' numbers in the whole."""

    FORMAT: ClassVar[str] = "slice"

    def __init__(self, source: DataSource, rows: range) -> None:
        source.check_rows(rows)
        self.source = source
        self.rows = rows
        super().__init__(source.path, source.options)

    def open(self) -> None:
        """Nothing: the source is open."""

    @cached_property
    def chunk_ends(self) -> NDArray[np.int64]:
        ends = self.source.chunk_ends
        inside = ends[(ends > self.rows.start) & (ends < self.rows.stop)]
        return np.append(inside, self.rows.stop) - self.rows.start

    def read(self, rows: range) -> Iterator[Record | BrokenRow]:
        self.check_rows(rows)
        return self.source.read(range(self.rows.start + rows.start, self.rows.start + rows.stop))


def split_source(source: DataSource, share: float) -> tuple[SourceSlice, SourceSlice]:
    """The rows to train on, and the last ones, a share of all and at least one, that are held out.

    Raises ValueError for a source of which nothing would be left.
    """
    n_held_out = max(1, round(share * source.n_rows))
    n = source.n_rows - n_held_out
    if n < 1:
        raise ValueError(
            f"got held_out {share} of {source.path}, which has {source.n_rows} rows: expected one that leaves a row to "
            "train on"
        )
    return SourceSlice(source, range(n)), SourceSlice(source, range(n, source.n_rows))
