"""Counting of broken rows in training: they are logged, and more than a given share of them ends the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from unimm.data.records import BrokenRow
from unimm.generation.numbers import parse_float, parse_int

logger = logging.getLogger(__name__)

# of each source, how many broken rows are logged
LOGGED_ROWS = 10


class BrokenRowCounter:
    """Counts the rows that were read, and the broken ones among them.

    max_share: a greater share of broken rows is a ValueError, once `min_rows` were read.
    """

    def __init__(self, *, max_share: float = 0.01, min_rows: int = 1000) -> None:
        self.max_share = parse_float(max_share, "max_share", "a number from 0 to 1", low=0, high=1)
        self.min_rows = parse_int(min_rows, "min_rows", low=1)
        self.n_rows = 0
        self.n_broken: dict[str, int] = {}  # by source
        self.first: BrokenRow | None = None

    @property
    def share(self) -> float:
        """Of broken rows."""
        return sum(self.n_broken.values()) / self.n_rows if self.n_rows else 0.0

    def add(self, n_rows: int, broken: Iterable[BrokenRow] = ()) -> None:
        """Count rows that were read, with the broken ones among them. Raises ValueError for too great a share of them."""
        self.n_rows += n_rows
        for row in broken:
            n = self.n_broken[row.source] = self.n_broken.get(row.source, 0) + 1
            self.first = self.first or row
            if n <= LOGGED_ROWS:
                more = "; further ones of this file are counted only" if n == LOGGED_ROWS else ""
                logger.warning("broken row, left out: %s%s", row, more)
        if self.n_rows >= self.min_rows and self.share > self.max_share:
            counts = ", ".join(f"{n} of {source}" for source, n in sorted(self.n_broken.items()))
            first = f"; the first: {self.first}" if self.first else ""
            raise ValueError(
                f"{sum(self.n_broken.values())} of {self.n_rows} rows are broken, expected at most {self.max_share:.2%}: "
                f"{counts}{first}; mend them (unimm data check lists them), or allow a greater share"
            )

    def to_json(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {"rows": self.n_rows, "broken": dict(self.n_broken)}

    def restore(self, counts: Mapping[str, Any]) -> None:
        """Go on from the counts of a checkpoint."""
        self.n_rows = parse_int(counts["rows"], "rows", low=0)
        self.n_broken = {
            source: parse_int(n, f"broken rows of {source}", low=0) for source, n in counts["broken"].items()
        }
