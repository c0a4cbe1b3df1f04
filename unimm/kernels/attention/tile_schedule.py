"""Which tiles of an attention matrix must be visited: exact, from spans of keys, without the matrix.

Axes: N query rows, M key rows, S spans, R ranges a key (1 or 2), I and J tiles of rows and of keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]
MIN_RUNS = 32  # arrays of runs are padded to this many or the next power of two, so that their shapes repeat


class TileRuns(NamedTuple):
    """For each tile of one axis, the tiles of the other that it sees: runs [begin, end) of consecutive ones, int32.

    Runs of tile i are entries ptr[i] to ptr[i + 1], two numbers each: full[2 j], full[2 j + 1]. Runs and no list of
    tiles, because then the address of a load does not hang on another load, and Triton keeps its pipeline.
    """

    full_ptr: Tensor  # [tiles + 1]
    full: Tensor  # [2 F], padded with zeros: tiles all of whose pairs are visible, which need no mask
    partial_ptr: Tensor  # [tiles + 1]
    partial: Tensor  # [2 P], padded with zeros: tiles some of whose pairs are visible

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
        """The same tiles on a device."""
        return TileSchedule(self.by_row.to(device), self.by_key.to(device), *self[2:])


@dataclass(frozen=True, eq=False)
class KeySpans:
    """Spans of consecutive keys whose ranges are equal or move on by one row a key; what a mask is made of.

    Key start + i of a span is seen by rows [first + i * first_step, last + i * last_step), and for a second range
    likewise; steps are 0 or 1. A key in no span is seen by nobody.
    """

    start: IntArray  # [S]
    length: IntArray  # [S]
    first: IntArray  # [S, R]
    last: IntArray  # [S, R]
    first_step: IntArray  # [S, R]
    last_step: IntArray  # [S, R]
    n_queries: int
    n_keys: int
    _schedules: dict[tuple[int, int], TileSchedule] = field(default_factory=dict, repr=False)

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[int, int, int, int, int]], n_queries: int, n_keys: int) -> "KeySpans":
        """From (start, length, first, last, first_step) of each span with one range; spans that nobody sees are left out."""
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
        turns = (np.diff(step, axis=2) != 0).any((0, 1)) & steady[:-1]
        cuts = np.flatnonzero(~steady | np.concatenate(([False], turns))[: len(steady)]) + 1
        start = np.concatenate((np.zeros(min(n_keys, 1), np.int64), cuts))
        length = np.diff(start, append=n_keys)
        step = np.pad(step, ((0, 0), (0, 0), (0, 1)))  # the last key may be a span of its own
        steps = np.where(length > 1, step[:, :, start], 0)
        seen = (length > 1) | (ranges[:, 1, start] > ranges[:, 0, start]).any(0)
        start, length, steps = start[seen], length[seen], steps[:, :, seen]
        (first, last), (first_step, last_step) = (x.transpose(1, 2, 0) for x in (ranges[:, :, start], steps))
        return cls(start, length, first, last, first_step, last_step, n_queries, n_keys)

    def ranges(self) -> NDArray[np.int32]:
        """The ranges of every key, [R, 2, M]; (0, 0) is empty."""
        out = np.zeros((self.first.shape[1], 2, self.n_keys), np.int32)
        of, i = _repeat_index(self.length)
        for r, range_ in enumerate(out):
            range_[0, self.start[of] + i] = self.first[of, r] + i * self.first_step[of, r]
            range_[1, self.start[of] + i] = self.last[of, r] + i * self.last_step[of, r]
        return out

    @property
    def n_visible_pairs(self) -> int:
        """Pairs of a row and a key that it sees."""
        n = self.length[:, None]
        return int((n * (self.last - self.first) + n * (n - 1) // 2 * (self.last_step - self.first_step)).sum())

    def schedule(self, rows: int, keys: int) -> TileSchedule:
        """The tiles of rows x keys; computed once for each size. A tile that sticks out of N or M is never full."""
        if (rows, keys) not in self._schedules:
            full, part = self.tile_visibility(rows, keys)
            by_row, by_key = (TileRuns(*_find_runs(f), *_find_runs(p)) for f, p in ((full, part), (full.T, part.T)))
            self._schedules[rows, keys] = TileSchedule(by_row, by_key, int(full.sum()), int(part.sum()), full.size)
        return self._schedules[rows, keys]

    def tile_visibility(self, rows: int, keys: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which tiles are full and which are partly visible, [I, J] each; work and memory of the order of I * J + S.

        Spans are cut at the borders of tiles. The rows that see some key of a piece, and those that see all its keys,
        are one interval each for a range (its bounds move by at most one row a key), and ranges of a key are apart:
        so counts of keys are sums over pieces, and sums over intervals are two marks and a running sum.
        """
        n_i, n_j = -(-self.n_queries // rows), -(-self.n_keys // keys)
        of, i = _repeat_index(-(-(self.start + self.length) // keys) - self.start // keys)
        tile = self.start[of] // keys + i
        a = np.maximum(self.start[of], tile * keys) - self.start[of]
        z = np.minimum(self.start[of] + self.length[of], (tile + 1) * keys) - self.start[of] - 1
        some, every = np.zeros((2, n_j * (n_i + 1)))
        for r in range(self.first.shape[1]):
            first, last, first_step, last_step = (
                x[of, r] for x in (self.first, self.last, self.first_step, self.last_step)
            )
            begin, end = (first + a * first_step) // rows, -(-(last + z * last_step) // rows)
            _add_interval(some, tile * (n_i + 1), begin, np.maximum(begin, end), np.ones_like(tile))
            begin, end = -(-(first + z * first_step) // rows), (last + a * last_step) // rows
            _add_interval(every, tile * (n_i + 1), begin, np.maximum(begin, end), z - a + 1)
        some, every = (x.reshape(n_j, n_i + 1).cumsum(1)[:, :n_i].T for x in (some, every))
        full = every == keys
        return full, (some > 0) & ~full


def _normalize_ranges(ranges: IntArray) -> IntArray:
    """The same pairs with ranges of a key in order and apart, empty ones (0, 0) and last, and as few ranges as do."""
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
    """For items of given counts laid end to end: whose, and the how-manieth of it."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - (np.cumsum(counts) - counts)[of]


def _add_interval(
    counts: NDArray[np.float64], line: IntArray, begin: IntArray, end: IntArray, weight: IntArray
) -> None:
    """Add weight from `begin` and take it back from `end`, in the line that begins at `line`."""
    at = np.concatenate((line + begin, line + end))
    counts += np.bincount(at, np.concatenate((weight, -weight)), len(counts))


def _find_runs(visits: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """Runs of True in each line of a matrix [I, J]: ptr [I + 1], and begin and end of each run, padded."""
    n, width = visits.shape
    edges = np.flatnonzero(
        np.diff(np.pad(visits, ((0, 0), (1, 1))).view(np.int8), axis=1)
    )  # begin, end, begin, end ...
    line, at = np.divmod(edges, width + 1)
    ptr = np.concatenate(([0], np.cumsum(np.bincount(line[::2], minlength=n))))
    runs = np.zeros(2 * max(MIN_RUNS, 1 << (len(at) // 2 - 1).bit_length()), np.int32)
    runs[: len(at)] = at
    return torch.from_numpy(ptr.astype(np.int32)), torch.from_numpy(runs)
