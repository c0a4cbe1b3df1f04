"""A mix of groups of datasets, by weights, with groups that every batch has: what it draws is decided by its seed, the
shard, and the numbers of draws before.

docs/data.md, "Mixing".
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from unimm.data.order import RowOrder, RowPlace, check_shard
from unimm.data.records import BrokenRow, Record, apply_to_record
from unimm.data.sources.base import DataSource
from unimm.generation.numbers import parse_float, parse_int

T = TypeVar("T")
# a record, and the generator of its random choices, as what training takes
Prepare = Callable[[Record, random.Random], T]
# draws of which every group has its share exactly, rounded to whole draws
BLOCK = 1000
# rows that are read and left out to reach one further on in the same piece
SKIPPED_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class MixGroup:
    """Datasets that are drawn from as one.

    weight: of its share of the draws. mandatory: whether every batch begins with one of its samples, beside its share.
    """

    name: str
    sources: Sequence[DataSource]
    weight: float = 1.0
    mandatory: bool = False


@dataclass(frozen=True, kw_only=True)
class MixState:
    """How far a shard has come: the choices of a group, and of every group the rows that were drawn."""

    draws: int
    rows: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"draws": self.draws, "rows": dict(self.rows)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MixState:
        """From a checkpoint."""
        rows = {name: parse_int(n, f"rows of {name}", low=0) for name, n in data["rows"].items()}
        return cls(draws=parse_int(data["draws"], "draws", low=0), rows=rows)


@dataclass(frozen=True, kw_only=True)
class Drawn(Generic[T]):
    """What one row of a group became, or why it is broken; its epoch and its number, by which it is read again."""

    group: str
    epoch: int
    row: int
    item: T | BrokenRow


@dataclass(frozen=True, kw_only=True)
class DrawnBatch(Generic[T]):
    """Samples with the names of their groups, and the broken rows that other rows stand in for."""

    samples: Sequence[tuple[str, T]]
    broken: Sequence[BrokenRow]


class DataMix(Generic[T]):
    """Groups of datasets, and what their records become.

    past: of every earlier number of shards the states of all its shards, as `go_on` gives it. prepare: raises ValueError
    where a record will not do, which makes it a broken row. Raises ValueError for weights and names that will not do.
    """

    def __init__(
        self,
        groups: Sequence[MixGroup],
        prepare: Prepare[T],
        *,
        seed: int,
        past: Sequence[Sequence[MixState]] = (),
    ) -> None:
        names = [group.name for group in groups]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"got the groups {', '.join(names) or 'none'}: expected one or more, each of its own name")
        if empty := [group.name for group in groups if not group.sources]:
            raise ValueError(f"got no dataset for {', '.join(empty)}: expected one or more for each group")
        self.groups = {group.name: group for group in groups}
        self.prepare = prepare
        self.seed = parse_int(seed, "seed")
        self.past = [list(states) for states in past]
        self.quotas = block_quotas({group.name: group.weight for group in groups})
        if unread := [group.name for group in groups if not (group.mandatory or self.quotas[group.name])]:
            raise ValueError(f"got a weight of 0 for {', '.join(unread)}: expected more, or a mandatory group")
        self.mandatory = tuple(group.name for group in groups if group.mandatory)

    def stream(self, shard: tuple[int, int] = (0, 1), state: MixState | None = None) -> MixStream[T]:
        """The draws of shard (i, n), from a state on."""
        return MixStream(self, check_shard(shard), state or MixState(draws=0, rows={}))


def go_on(
    past: Sequence[Sequence[MixState]], states: Sequence[MixState], n_shards: int
) -> tuple[list[list[MixState]], list[MixState]]:
    """`past` of a mix and the state of each of n shards, for a run that stopped with these states of its shards.

    With as many shards as before each goes on where it was; otherwise every group's rows that were left are divided again.
    """
    if len(states) == n_shards:
        return [list(one) for one in past], list(states)
    fresh = MixState(draws=0, rows={})
    return [*(list(one) for one in past), list(states)], [fresh] * n_shards


class MixStream(Generic[T]):
    """The draws of one shard, in order: what a packer takes, with its place as a small state; or whole batches by step."""

    def __init__(self, mix: DataMix[T], shard: tuple[int, int], state: MixState) -> None:
        self.mix = mix
        self.shard = shard
        self.draws = state.draws
        self.rows = {name: state.rows.get(name, 0) for name in mix.groups}
        if unknown := sorted(state.rows.keys() - mix.groups.keys()):
            raise ValueError(
                f"got a state of the groups {', '.join(unknown)}: expected those of {', '.join(mix.groups)}"
            )
        self._readers = {name: _GroupReader(mix, group, shard) for name, group in mix.groups.items()}

    @property
    def state(self) -> MixState:
        """Where it is now."""
        return MixState(draws=self.draws, rows=dict(self.rows))

    @property
    def mandatory(self) -> tuple[str, ...]:
        """The names of the groups that a batch begins with."""
        return self.mix.mandatory

    def choose(self) -> str:
        """The group of the next draw, by weight; it moves on by one."""
        name = self._block(self.draws // BLOCK)[self.draws % BLOCK]
        self.draws += 1
        return name

    def draw(self, group: str) -> Drawn[T]:
        """What the group's next row became; it moves on by one row, broken or not."""
        drawn = self._readers[group].read(self.rows[group])
        self.rows[group] += 1
        return drawn

    def draw_again(self, group: str, epoch: int, row: int) -> Drawn[T]:
        """What was drawn before, by this shard or another; it moves nothing. Raises ValueError for no row of the mix."""
        if group not in self._readers:
            raise ValueError(f"got a row of the group {group}: expected one of {', '.join(self.mix.groups)}")
        return self._readers[group].read_at(RowPlace(epoch, row, row + 1))

    def batch(self, step: int, size: int) -> DrawnBatch[T]:
        """The samples of a step, of as many at every step: one of each mandatory group, then others by weight.

        It depends on the step alone, not on what was drawn before. For a broken row the next whole one of its group
        stands in. Raises ValueError where a whole pass over a group finds none.
        """
        free = size - len(self.mandatory)
        if free < 0 or size < 1:
            raise ValueError(
                f"got a batch of {size}: expected a sample or more, and each of {', '.join(self.mandatory)}"
            )
        first = step * free
        rows = {name: self._chosen(first, name) + step * (name in self.mandatory) for name in self.mix.groups}
        names = [*self.mandatory, *(self._block(n // BLOCK)[n % BLOCK] for n in range(first, first + free))]
        samples = []
        broken: list[BrokenRow] = []
        for name in names:
            samples.append((name, self._whole(name, rows[name], broken)))
            rows[name] += 1
        return DrawnBatch(samples=samples, broken=broken)

    def _whole(self, name: str, count: int, broken: list[BrokenRow]) -> T:
        """What the first whole row from `count` on became; the broken ones before it are added to the list."""
        reader = self._readers[name]
        for n in range(count, count + reader.n_rows):
            item = reader.read(n).item
            if not isinstance(item, BrokenRow):
                return item
            broken.append(item)
        raise ValueError(f"every one of the {reader.n_rows} rows of the group {name} is broken; the last: {broken[-1]}")

    def _chosen(self, draws: int, name: str) -> int:
        """How often a group is chosen in the first draws."""
        blocks, rest = divmod(draws, BLOCK)
        return blocks * self.mix.quotas[name] + (self._block(blocks)[:rest].count(name) if rest else 0)

    def _block(self, number: int) -> Sequence[str]:
        quotas = tuple(self.mix.quotas.items())
        return shuffled_block(quotas, f"{self.mix.seed}/{len(self.mix.past)}/{self.shard}/{number}")


class _GroupReader(Generic[T]):
    """Reads the rows of a group in a shard's order, on in the same piece where it can."""

    def __init__(self, mix: DataMix[T], group: MixGroup, shard: tuple[int, int]) -> None:
        self.mix = mix
        self.group = group
        self.joined = JoinedSources(group.sources)
        self.n_rows = self.joined.n_rows
        past = [[state.rows.get(group.name, 0) for state in states] for states in mix.past]
        self.order = RowOrder(self.joined.chunk_ends, seed=f"{mix.seed}/{group.name}", shard=shard, past=past)
        self._open: tuple[int, int, Iterator[Record | BrokenRow]] | None = None  # next row, stop, rows

    def read(self, count: int) -> Drawn[T]:
        """What the shard's row of this number became."""
        return self.read_at(self.order.place(count))

    def read_at(self, place: RowPlace) -> Drawn[T]:
        """What the row of a place became. Raises ValueError for a row that the group does not have."""
        if not 0 <= place.row < self.n_rows:
            raise ValueError(
                f"got row {place.row} of the group {self.group.name}, which has {self.n_rows}: its datasets have changed"
            )
        row = self._row(place.row, place.stop)
        rng = random.Random(f"{self.mix.seed}/{self.group.name}/{place.epoch}/{place.row}")
        item: T | BrokenRow
        item = row if isinstance(row, BrokenRow) else apply_to_record(row, lambda one: self.mix.prepare(one, rng))
        return Drawn(group=self.group.name, epoch=place.epoch, row=place.row, item=item)

    def _row(self, number: int, stop: int) -> Record | BrokenRow:
        at, end, rows = self._open or (0, -1, iter(()))
        if end != stop or not at <= number <= at + SKIPPED_ROWS:
            at = number
            rows = self.joined.read(range(number, stop))
        for _ in range(number - at):
            next(rows)
        row = next(rows)
        self._open = (number + 1, stop, rows)
        return row

    def __getstate__(self) -> dict[str, Any]:
        """Without the files that are open."""
        return self.__dict__ | {"_open": None}


class JoinedSources:
    """Several datasets, one after the other."""

    def __init__(self, sources: Sequence[DataSource]) -> None:
        self.sources = sources
        starts = np.cumsum([0, *(source.n_rows for source in sources)])
        self.starts = [int(start) for start in starts]
        self.n_rows = self.starts[-1]

    @property
    def chunk_ends(self) -> NDArray[np.int64]:
        """As a DataSource's."""
        ends = [start + one.chunk_ends for start, one in zip(self.starts[:-1], self.sources, strict=True)]
        return np.concatenate(ends)

    def read(self, rows: range) -> Iterator[Record | BrokenRow]:
        """Yield rows of one piece, which lies in one dataset."""
        at = int(np.searchsorted(self.starts, rows.start, side="right")) - 1
        return self.sources[at].read(range(rows.start - self.starts[at], rows.stop - self.starts[at]))


def block_quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """How many draws of a block each group has: its share, rounded so that they add up, and one at least for any weight.

    Raises ValueError for weights that are no numbers or all 0.
    """
    values = {
        name: parse_float(weight, f"the weight of {name}", "0 or a positive number", low=0)
        for name, weight in weights.items()
    }
    whole = sum(values.values())
    if len(values) > BLOCK:
        raise ValueError(f"got {len(values)} groups: expected at most {BLOCK}; join some")
    if not whole:
        raise ValueError(f"got weights of 0 for {', '.join(values)}: expected one that is more")
    exact = {name: BLOCK * value / whole for name, value in values.items()}
    quotas = {name: max(int(share), int(share > 0)) for name, share in exact.items()}
    while (missing := BLOCK - sum(quotas.values())) != 0:
        step = 1 if missing > 0 else -1
        able = [name for name in quotas if (quotas[name] if step > 0 else quotas[name] > 1)]
        # the group that is furthest from its share, the first of several
        name = max(able, key=lambda name: step * (exact[name] - quotas[name]))
        quotas[name] += step
    return quotas


@lru_cache(maxsize=64)
def shuffled_block(quotas: tuple[tuple[str, int], ...], seed: str) -> tuple[str, ...]:
    """The groups of a block's draws in an order that the seed decides."""
    names = list(Counter(dict(quotas)).elements())
    random.Random(seed).shuffle(names)
    return tuple(names)
