"""The order in which training meets the rows of a source, and how they are divided among ranks and workers.

Every epoch takes the source's chunks in a new order, and gives them to the shards by turns. A shard's place in it is one
number, of the rows that it has had. A run that goes on with another number of shards divides again what the old shards
have left, so that every row still comes once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from unimm.generation.numbers import parse_int

# pieces of rows [n, 2], where each starts and stops
Pieces = NDArray[np.int64]


@dataclass(frozen=True)
class RowPlace:
    """A row of a source, the epoch, and where the piece ends that is read on from it."""

    epoch: int
    row: int
    stop: int


class RowOrder:
    """The order of a source's rows for one of n shards.

    chunk_ends: as DataSource has them. past: of every earlier number of shards, how many rows each of its shards had.
    """

    def __init__(
        self,
        chunk_ends: NDArray[np.int64],
        *,
        seed: str,
        shard: tuple[int, int] = (0, 1),
        past: Sequence[Sequence[int]] = (),
    ) -> None:
        # an empty chunk is none
        self.chunk_ends = np.unique(chunk_ends[chunk_ends > 0])
        self.seed = seed
        self.shard = check_shard(shard)
        self.past = [[parse_int(n, "a shard's number of rows", low=0) for n in counts] for counts in past]
        # of the epochs that a walk has been through: the first that is not, and the rows before it
        self._reached = (0, 0)
        self._before = lru_cache(maxsize=4)(self._pieces_before)
        self._rows: dict[tuple[int, int], list[int]] = {}
        # of the shard itself: rows by epoch, and the epoch that was read from last
        self._totals: dict[int, int] = {}
        self._pieces: tuple[int, Pieces, NDArray[np.int64]] | None = None

    def place(self, count: int) -> RowPlace:
        """The shard's row of this number, from 0; counts that grow cost least."""
        if count < self._reached[1]:
            self._reached = (0, 0)
        while True:
            epoch, before = self._reached
            if epoch not in self._totals:
                self._totals[epoch] = total(self.pieces(epoch))
            if count < before + self._totals[epoch]:
                break
            self._reached = (epoch + 1, before + self._totals[epoch])
        pieces, ends = self._current(epoch)
        at = int(np.searchsorted(ends, count - before, side="right"))
        start, stop = (int(edge) for edge in pieces[at])
        behind = count - before - (int(ends[at - 1]) if at else 0)
        return RowPlace(epoch, start + behind, stop)

    def _current(self, epoch: int) -> tuple[Pieces, NDArray[np.int64]]:
        """The pieces of an epoch, and the rows up to the end of each; kept for the next call."""
        if self._pieces is None or self._pieces[0] != epoch:
            pieces = self.pieces(epoch)
            self._pieces = (epoch, pieces, (pieces[:, 1] - pieces[:, 0]).cumsum())
        return self._pieces[1:]

    def pieces(self, epoch: int) -> Pieces:
        """The pieces of an epoch that the shard has, in its order."""
        return shard_pieces(self._before(len(self.past), epoch), epoch, len(self.chunk_ends), self.shard)

    def _pieces_before(self, world: int, epoch: int) -> Pieces:
        """The pieces of an epoch that are divided among one number of shards: all, or those left by earlier
        ones."""
        if world == 0:
            return shuffled_chunks(self.chunk_ends, f"{self.seed}/{epoch}")
        pieces = self._before(world - 1, epoch)
        counts = self.past[world - 1]
        n = len(counts)
        left = []
        places = []
        for i, count in enumerate(counts):
            shard = (i, n)
            had = max(count - sum(self._shard_rows(world - 1, earlier)[i] for earlier in range(epoch)), 0)
            mine = np.arange(first_shard_piece(epoch, len(self.chunk_ends), shard), len(pieces), n)
            after = drop_rows(pieces[mine], had)
            left.append(after)
            places.append(mine[len(mine) - len(after) :])
        return np.concatenate(left)[np.argsort(np.concatenate(places), kind="stable")]

    def _shard_rows(self, world: int, epoch: int) -> list[int]:
        """How many rows of an epoch each shard has, of one number of shards."""
        if (world, epoch) not in self._rows:
            pieces = self._before(world, epoch)
            n = len(self.past[world])
            rows = [total(shard_pieces(pieces, epoch, len(self.chunk_ends), (i, n))) for i in range(n)]
            self._rows[world, epoch] = rows
        return self._rows[world, epoch]

    def __getstate__(self) -> dict[str, object]:
        """Without what is quickly made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_before"} | {"_pieces": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._before = lru_cache(maxsize=4)(self._pieces_before)


def check_shard(shard: tuple[int, int]) -> tuple[int, int]:
    """(number, how many). Raises ValueError for a number that is not below how many there are."""
    i = parse_int(shard[0], "a shard's number", low=0)
    n = parse_int(shard[1], "the number of shards", low=1)
    if i >= n:
        raise ValueError(f"got shard {i} of {n}: expected a number from 0 to {n - 1}")
    return i, n


def shuffled_chunks(chunk_ends: NDArray[np.int64], seed: str) -> Pieces:
    """The chunks in an order that the seed alone decides."""
    starts = np.concatenate([[0], chunk_ends[:-1]])
    # numpy promises of RandomState alone that a seed gives the same permutation in every version
    rng = np.random.RandomState(np.frombuffer(seed.encode(), dtype=np.uint8).astype(np.uint32))
    return np.stack([starts, chunk_ends], axis=1)[rng.permutation(len(chunk_ends))]


def first_shard_piece(epoch: int, n_chunks: int, shard: tuple[int, int]) -> int:
    """The first piece of an epoch that a shard has: the turns go on from epoch to epoch, so that fewer chunks than
    shards reach every shard."""
    i, n = shard
    return (i - epoch * n_chunks) % n


def shard_pieces(pieces: Pieces, epoch: int, n_chunks: int, shard: tuple[int, int]) -> Pieces:
    """The pieces of an epoch that a shard has."""
    return pieces[first_shard_piece(epoch, n_chunks, shard) :: shard[1]]


def total(pieces: Pieces) -> int:
    """The number of rows."""
    return int((pieces[:, 1] - pieces[:, 0]).sum())


def drop_rows(pieces: Pieces, n_rows: int) -> Pieces:
    """The pieces without their first rows."""
    ends = (pieces[:, 1] - pieces[:, 0]).cumsum()
    whole = int(np.searchsorted(ends, n_rows, side="right"))
    left = pieces[whole:].copy()
    if len(left):
        left[0, 0] += n_rows - (int(ends[whole - 1]) if whole else 0)
    return left
