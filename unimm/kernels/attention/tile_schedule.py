"""The tiles of an attention matrix that must be visited: exact, from spans of keys, without the matrix.

Axes: N query rows, M key rows, R ranges of a key (1 or 2). Tiles are numbered i of I along the rows, j of J along the
keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]
MIN_RUNS = 32  # arrays of runs are padded to this length or the next power of two, so that their shapes repeat


class TileRuns(NamedTuple):
    """For each tile of one axis, the tiles of the other that it needs: runs [begin, end) of consecutive ones, int32.

    The runs of tile i are entries ptr[i] to ptr[i + 1], two numbers each: full[2 j], full[2 j + 1]. Runs and not a list
    of tiles, because then the address of a load does not depend on another load, and Triton keeps its pipeline.
    """

    full_ptr: Tensor  # [tiles + 1]
    full: Tensor  # [2 runs], padded with zeros: tiles all of whose pairs are visible, which need no mask
    partial_ptr: Tensor  # [tiles + 1]
    partial: Tensor  # [2 runs], padded with zeros: tiles some of whose pairs are visible

    def to(self, device: torch.device | str) -> "TileRuns":
        """The same runs on a device."""
        return TileRuns(*(t.to(device) for t in self))


class TileSchedule(NamedTuple):
    """A mask cut into tiles: the runs of key tiles of each tile of rows, the runs of row tiles of each tile of keys."""

    by_row: TileRuns
    by_key: TileRuns
    n_full: int
    n_partial: int
    n_all: int

    def to(self, device: torch.device | str) -> "TileSchedule":
        """The same schedule on a device."""
        return TileSchedule(self.by_row.to(device), self.by_key.to(device), *self[2:])


@dataclass(frozen=True, eq=False)
class KeySpans:
    """A mask as spans of consecutive keys whose row ranges are equal or move on by one row per key.

    Rows [first + i * first_step, last + i * last_step) attend to key start + i of a span, and likewise those of a
    second range; steps are 0 or 1. No row attends to a key outside all spans. The arrays have a row per span.
    """

    start: IntArray  # [spans]
    length: IntArray  # [spans]
    first: IntArray  # [spans, R]
    last: IntArray  # [spans, R]
    first_step: IntArray  # [spans, R]
    last_step: IntArray  # [spans, R]
    n_queries: int
    n_keys: int
    _schedules: dict[tuple[int, int], TileSchedule] = field(default_factory=dict, repr=False)

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[int, int, int, int, int]], n_queries: int, n_keys: int) -> "KeySpans":
        """From (start, length, first, last, first_step) of each span with one range, but for those without a row."""
        table = np.array([row for row in rows if row[1] and row[3] > row[2]], dtype=np.int64).reshape(-1, 5)
        start, length = table[:, :2].T
        first, last, step = (table[:, i : i + 1] for i in (2, 3, 4))
        return cls(start, length, first, last, step, np.zeros_like(step), n_queries, n_keys)

    @classmethod
    def from_ranges(cls, ranges: IntArray, n_queries: int) -> "KeySpans":
        """From ranges [R, 2, M]: a span ends where a bound does anything but stay or move on by one."""
        ranges = _normalize_ranges(ranges)
        n_keys = ranges.shape[2]
        step = np.diff(ranges, axis=2)
        steady = ((step == 0) | (step == 1)).all((0, 1))
        step_changes = (np.diff(step, axis=2) != 0).any((0, 1)) & steady[:-1]
        cuts = np.flatnonzero(~steady | np.concatenate(([False], step_changes))[: len(steady)]) + 1
        start = np.concatenate((np.zeros(min(n_keys, 1), np.int64), cuts))
        length = np.diff(start, append=n_keys)
        step = np.pad(step, ((0, 0), (0, 0), (0, 1)))  # the last key may be a span of its own
        steps = np.where(length > 1, step[:, :, start], 0)
        kept = (length > 1) | (ranges[:, 1, start] > ranges[:, 0, start]).any(0)
        start = start[kept]
        length = length[kept]
        steps = steps[:, :, kept]
        (first, last), (first_step, last_step) = (x.transpose(1, 2, 0) for x in (ranges[:, :, start], steps))
        return cls(start, length, first, last, first_step, last_step, n_queries, n_keys)

    def ranges(self) -> NDArray[np.int32]:
        """The ranges of every key, [R, 2, M]; (0, 0) is empty."""
        out = np.zeros((self.first.shape[1], 2, self.n_keys), np.int32)
        span, i = _repeat_index(self.length)
        for r, range_ in enumerate(out):
            range_[0, self.start[span] + i] = self.first[span, r] + i * self.first_step[span, r]
            range_[1, self.start[span] + i] = self.last[span, r] + i * self.last_step[span, r]
        return out

    @property
    def n_visible_pairs(self) -> int:
        """Pairs of a row and a key that it attends to."""
        n = self.length[:, None]
        return int((n * (self.last - self.first) + n * (n - 1) // 2 * (self.last_step - self.first_step)).sum())

    def schedule(self, rows: int, keys: int) -> TileSchedule:
        """The tiles of rows x keys; computed once for each size. A tile that exceeds N or M is never full."""
        if (rows, keys) not in self._schedules:
            full, partial = self.tile_visibility(rows, keys)
            by_row, by_key = (
                TileRuns(*_find_runs(f), *_find_runs(p)) for f, p in ((full, partial), (full.T, partial.T))
            )
            self._schedules[rows, keys] = TileSchedule(by_row, by_key, int(full.sum()), int(partial.sum()), full.size)
        return self._schedules[rows, keys]

    def tile_visibility(self, rows: int, keys: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether each tile is full, and whether it is partly visible, [I, J] each; work and memory grow as I * J +
        spans.

        Spans are cut at the borders of tiles into pieces. The rows that attend to some key of a piece, and those that
        attend to all its keys, are one interval each per range (its bounds move by at most one row per key), and the
        ranges of a key are apart: so counts of keys are sums over pieces, and sums over intervals are two entries and a
        running sum.
        """
        n_i = -(-self.n_queries // rows)
        n_j = -(-self.n_keys // keys)
        span, i = _repeat_index(-(-(self.start + self.length) // keys) - self.start // keys)
        tile = self.start[span] // keys + i
        # the piece's first and last key, counted from the span's start
        begin = np.maximum(self.start[span], tile * keys) - self.start[span]
        end = np.minimum(self.start[span] + self.length[span], (tile + 1) * keys) - self.start[span] - 1
        n_any, n_all = np.zeros((2, n_j * (n_i + 1)))
        line = tile * (n_i + 1)
        for r in range(self.first.shape[1]):
            bounds = (self.first, self.last, self.first_step, self.last_step)
            first, last, first_step, last_step = (x[span, r] for x in bounds)
            # tiles of rows that attend to some key of the piece
            i_begin = (first + begin * first_step) // rows
            i_end = -(-(last + end * last_step) // rows)
            _add_interval(n_any, line, i_begin, np.maximum(i_begin, i_end), np.ones_like(tile))
            # tiles of rows that attend to all of them
            i_begin = -(-(first + end * first_step) // rows)
            i_end = (last + begin * last_step) // rows
            _add_interval(n_all, line, i_begin, np.maximum(i_begin, i_end), end - begin + 1)
        n_any, n_all = (x.reshape(n_j, n_i + 1).cumsum(1)[:, :n_i].T for x in (n_any, n_all))
        full = n_all == keys
        return full, (n_any > 0) & ~full


def _normalize_ranges(ranges: IntArray) -> IntArray:
    """The same pairs with a key's ranges in order and apart, empty ones (0, 0) and last, as few as possible."""
    first, last = ranges.transpose(1, 0, 2)
    first, last = (np.where(last > first, x, 0) for x in (first, last))
    if len(first) == 2:
        swap = (last[0] == 0) | ((last[1] > 0) & (first[1] < first[0]))
        first, last = (np.where(swap, x[::-1], x) for x in (first, last))
        touch = (last[1] > 0) & (first[1] <= last[0])
        last[0] = np.where(touch, last.max(0), last[0])
        first[1], last[1] = (np.where(touch, 0, x[1]) for x in (first, last))
    out = np.stack((first, last), 1)
    return out if len(out) == 1 or last[1].any() else out[:1]


def _repeat_index(counts: IntArray) -> tuple[IntArray, IntArray]:
    """For groups of these counts laid end to end: the group of each element, and its index within the group."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - (np.cumsum(counts) - counts)[group]


def _add_interval(
    counts: NDArray[np.float64], line: IntArray, begin: IntArray, end: IntArray, weight: IntArray
) -> None:
    """Add weight at `begin` and subtract it at `end` in the line from `line` on; a running sum fills the interval."""
    at = np.concatenate((line + begin, line + end))
    counts += np.bincount(at, np.concatenate((weight, -weight)), len(counts))


def _find_runs(tiles: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """Runs of True in each line of a matrix [I, J]: ptr [I + 1], and begin and end of each run, padded."""
    n, width = tiles.shape
    edges = np.flatnonzero(np.diff(np.pad(tiles, ((0, 0), (1, 1))).view(np.int8), axis=1))  # begin, end, begin, end ...
    line, at = np.divmod(edges, width + 1)
    ptr = np.concatenate(([0], np.cumsum(np.bincount(line[::2], minlength=n))))
    runs = np.zeros(2 * max(MIN_RUNS, 1 << (len(at) // 2 - 1).bit_length()), np.int32)
    runs[: len(at)] = at
    return torch.from_numpy(ptr.astype(np.int32)), torch.from_numpy(runs)
