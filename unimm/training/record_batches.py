"""Batches of records: opens the datasets that a recipe names, and makes the batches of one rank in worker processes.

A rank's batches come from the recipe's number of lanes by turns. A lane is a shard of the datasets with a packer of its own,
so that a batch depends on the seed, the rank, the number of ranks and the batch's number, and not on the number of
processes. Every batch carries the state of its lane behind it: a checkpoint holds those of the batches that were trained
on, whatever the processes have made ahead.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from unimm.data.broken_rows import BrokenRowCounter
from unimm.data.mix import DataMix, JoinedSources, MixGroup, MixState, go_on
from unimm.data.records import BrokenRow
from unimm.data.sources.base import SourceOptions
from unimm.data.sources.formats import open_source
from unimm.data.sources.slices import SourceSlice, split_source
from unimm.training.batches import BatchError, BatchSource, StepBatches, end_workers, start_worker
from unimm.training.config import TrainConfig
from unimm.training.data_config import DataConfig, PackingConfig
from unimm.training.packing import (
    FixedSizeBatcher,
    NumberedBatch,
    Packer,
    SampleBuilder,
    TokenPacker,
    UniformBatcher,
    UniformSampleBuilder,
)
from unimm.training.tasks.base import RecordTask, StepTask, TrainingTask

logger = logging.getLogger(__name__)

# batches that a process makes ahead
PREFETCH = 2
# rows that were read before a share of broken ones ends the run, unless the datasets have fewer
MIN_ROWS = 1000
# of a group, rows that are tried at the start until one can be used
TRIED_ROWS = 16
# messages on samples that are left out
LOGGED_SAMPLES = 10


def open_groups(data: DataConfig, *, where: str = "data") -> list[MixGroup]:
    """The datasets that a recipe names, without what they hold out.

    Raises ValueError, with the group, for what cannot be opened. where: the section of the recipe.
    """
    groups = []
    for name, group in data.groups.items():
        options = SourceOptions(
            images=Path(group.images) if group.images else None, columns=group.columns, video_frames=group.video_frames
        )
        try:
            sources = [open_source(path, format=group.format or None, options=options) for path in group.paths]
            if group.held_out:
                sources = [split_source(source, group.held_out)[0] for source in sources]
        except ValueError as error:
            raise ValueError(f"{where}.groups.{name}: {error}") from error
        groups.append(MixGroup(name=name, sources=sources, weight=group.weight, mandatory=group.mandatory))
    # what is wrong of the weights is said now, too
    DataMix(groups, prepare=lambda record, rng: record, seed=0)
    return groups


def describe_groups(groups: Sequence[MixGroup], *, where: str = "data") -> dict[str, str]:
    """How many rows each group has, in which pieces: of the same datasets the same. where: the section of the recipe."""
    found = {}
    for group in groups:
        joined = JoinedSources(group.sources)
        ends = joined.chunk_ends
        found[f"{where}.groups.{group.name}"] = (
            f"{joined.n_rows} rows in {len(ends)} pieces (checksum {zlib.crc32(ends.tobytes()):08x})"
        )
    return found


def held_out_groups(groups: Sequence[MixGroup]) -> list[MixGroup]:
    """What the groups of `open_groups` hold out; those that hold out nothing are left out."""
    found = []
    for group in groups:
        slices = [source for source in group.sources if isinstance(source, SourceSlice)]
        rest = [SourceSlice(one.source, range(one.rows.stop, one.source.n_rows)) for one in slices]
        found += [replace(group, sources=rest)] if rest else []
    return found


@dataclass(frozen=True, kw_only=True)
class LaneState:
    """Where a lane goes on: its place in the mix, and the samples that wait, by (group, epoch, row)."""

    mix: MixState
    waiting: tuple[tuple[str, int, int], ...]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"mix": self.mix.to_json(), "waiting": [list(one) for one in self.waiting]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LaneState:
        """From a checkpoint."""
        waiting = tuple((group, epoch, row) for group, epoch, row in data["waiting"])
        return cls(mix=MixState.from_json(data["mix"]), waiting=waiting)


@dataclass(frozen=True, kw_only=True)
class LaneBatch:
    """A batch, the state of its lane behind it, and what went into it."""

    batch: Any
    state: LaneState
    n_samples: int
    n_tokens: int
    n_rows: int
    broken: Sequence[BrokenRow]
    left_out: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class LaneConfig:
    """What lanes make batches of, and how."""

    mix: DataMix[Any]
    builder: SampleBuilder[Any]
    packing: PackingConfig | None
    batch_size: int
    # of all ranks, one rank's after the other's
    n_lanes: int


class Lane:
    """One stream of batches."""

    def __init__(self, config: LaneConfig, number: int, state: LaneState) -> None:
        self.config = config
        self.number = number
        self.stream = config.mix.stream((number, config.n_lanes), state.mix)
        waiting = [self.stream.draw_again(*one) for one in state.waiting]
        for one in waiting:
            if isinstance(one.item, BrokenRow):
                raise ValueError(f"a sample of the checkpoint cannot be read again: {one.item}; put its file back")
        self.packer: Packer[Any]
        if config.packing is not None:
            self.packer = TokenPacker(self.stream, config.packing, waiting)
        elif isinstance(config.builder, UniformSampleBuilder):
            self.packer = UniformBatcher(self.stream, config.batch_size, config.builder.batch_key, waiting)
        else:
            self.packer = FixedSizeBatcher(self.stream, config.batch_size)

    def make(self, number: int) -> LaneBatch:
        """The next batch, which has this number among those of its rank."""
        group = self.packer.next_group()
        rng = random.Random(f"{self.config.mix.seed}/batch/{self.number}/{self.config.n_lanes}/{number}")
        waiting = tuple((one.group, one.epoch, one.row) for one in self.packer.waiting)
        batch = self.config.builder.collate([drawn.item for drawn in group.samples], rng)
        return LaneBatch(
            batch=batch.with_number(number) if isinstance(batch, NumberedBatch) else batch,
            state=LaneState(mix=self.stream.state, waiting=waiting),
            n_samples=len(group.samples),
            n_tokens=group.n_tokens,
            n_rows=group.n_rows,
            broken=group.broken,
            left_out=group.left_out,
        )


@dataclass(frozen=True, kw_only=True)
class LaneDataset(IterableDataset[Any]):
    """The batches of one rank from `start` on, for a DataLoader whose number of processes divides that of the lanes."""

    config: LaneConfig
    # the number of the rank's first lane, and the states of its lanes
    first_lane: int
    states: Sequence[LaneState]
    start: int
    stop: int

    def __iter__(self) -> Iterator[LaneBatch | BatchError]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        n = len(self.states)
        lanes: dict[int, Lane] = {}
        for number in range(self.start + first, self.stop, step):
            i = number % n
            try:
                if i not in lanes:
                    lanes[i] = Lane(self.config, self.first_lane + i, self.states[i])
                yield lanes[i].make(number)
            except (ValueError, TypeError, LookupError, OSError, RuntimeError, ArithmeticError) as error:
                # raised again by PackedBatches: the loader would wrap its message in a worker's trace
                yield BatchError(error)
                return


class PackedBatches:
    """The batches of one rank that a recipe's `data` and `packing` ask for: a BatchSource (unimm.training.batches)."""

    def __init__(
        self,
        groups: Sequence[MixGroup],
        builder: SampleBuilder[Any],
        recipe: TrainConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert recipe.data is not None, "the recipe has data"
        self.groups = groups
        self.datasets = describe_groups(groups)
        self.builder = builder
        self.recipe = recipe
        self.n_lanes = recipe.data.lanes
        self.rank = rank
        self.world_size = world_size
        self.past: list[list[MixState]] = []
        self.states = [LaneState(mix=MixState(draws=0, rows={}), waiting=())] * self.n_lanes
        # batches that were yielded; None where no run was loaded: as many as come before the first one asked for
        self.n_batches: int | None = None
        n_rows = sum(source.n_rows for group in groups for source in group.sources)
        self.counter = BrokenRowCounter(max_share=recipe.data.max_broken, min_rows=min(MIN_ROWS, n_rows))
        self.n_left_out = 0
        # samples, tokens and batches since the last report
        self.sums = {"samples": 0, "tokens": 0, "batches": 0}

    def iterate(self, start: int, stop: int, *, workers: int) -> Generator[Any, None, None]:
        """Yield this rank's batches number start ... stop - 1, made ahead by worker processes, which closing it ends.

        Raises ValueError where too many rows are broken, and what making a batch raises.
        """
        if self.n_batches is None:
            self.n_batches = start
        first = self.n_batches
        loader = DataLoader(
            LaneDataset(
                config=self.lane_config(),
                first_lane=self.rank * self.n_lanes,
                states=list(self.states),
                start=first,
                stop=first + stop - start,
            ),
            batch_size=None,
            num_workers=workers_for(self.n_lanes, workers),
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=start_worker,
            # its own generator, so that starting workers does not move the global one and with it a resumed run
            generator=torch.Generator(),
        )
        iterator = iter(loader)
        try:
            for made in iterator:
                if isinstance(made, BatchError):
                    raise made.error
                self._count(made)
                yield made.batch
        finally:
            end_workers(iterator)

    def lane_config(self) -> LaneConfig:
        """What the lanes of this rank are made by."""
        return LaneConfig(
            mix=DataMix(self.groups, self.builder.prepare, seed=self.recipe.seed, past=self.past),
            builder=self.builder,
            packing=self.recipe.packing,
            batch_size=self.recipe.batch_size,
            n_lanes=self.world_size * self.n_lanes,
        )

    def _count(self, made: LaneBatch) -> None:
        """Note a batch before it is yielded."""
        assert self.n_batches is not None, "batches are counted from the first on"
        self.states[self.n_batches % self.n_lanes] = made.state
        self.n_batches += 1
        for message in made.left_out:
            self.n_left_out += 1
            if self.n_left_out <= LOGGED_SAMPLES:
                more = "; further ones are counted only" if self.n_left_out == LOGGED_SAMPLES else ""
                logger.warning("sample left out: %s%s", message, more)
        self.sums["samples"] += made.n_samples
        self.sums["tokens"] += made.n_tokens
        self.sums["batches"] += 1
        self.counter.add(made.n_rows, made.broken)

    def state_dict(self) -> dict[str, Any]:
        """Where the batches go on after the last one that was yielded, and the counts of rows."""
        return {
            "n_batches": self.n_batches or 0,
            "datasets": self.datasets,
            "lanes": [state.to_json() for state in self.states],
            "past": [[state.to_json() for state in states] for states in self.past],
            "rows": self.counter.to_json(),
            "left_out": self.n_left_out,
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where the ranks of another run stood, in order.

        With as many lanes in all as that run had each goes on where it was. Otherwise what is left of every dataset is
        dealt again, and so are the samples that wait.
        """
        lanes = [LaneState.from_json(lane) for state in states for lane in state["lanes"]]
        past = [[MixState.from_json(one) for one in world] for world in states[0]["past"]]
        n = self.world_size * self.n_lanes
        self.past, mixes = go_on(past, [lane.mix for lane in lanes], n)
        if len(lanes) == n:
            waiting = [lane.waiting for lane in lanes]
        else:
            everything = [one for lane in lanes for one in lane.waiting]
            waiting = [tuple(everything[i::n]) for i in range(n)]
        mine = slice(self.rank * self.n_lanes, (self.rank + 1) * self.n_lanes)
        found = zip(mixes[mine], waiting[mine], strict=True)
        self.states = [LaneState(mix=mix, waiting=some) for mix, some in found]
        self.n_batches = max(state["n_batches"] for state in states)
        self._load_counts(states)
        if not self.rank:
            # earlier checkpoints have none
            self._compare_datasets(states[0].get("datasets", {}))

    def _compare_datasets(self, before: Mapping[str, str]) -> None:
        """Say which datasets are others than when the checkpoint was written."""
        for name, one in self.datasets.items():
            if before.get(name, one) != one:
                logger.warning(
                    "%s has %s, and had %s when the checkpoint was written: rows of the epoch that it goes on with may come "
                    "twice, or not at all",
                    *(name, one, before[name]),
                )

    def _load_counts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Each rank's own counts, or where there were other ranks all of them on the first one."""
        if len(states) == self.world_size:
            states = [states[self.rank]]
        elif self.rank:
            return
        broken: dict[str, int] = {}
        for state in states:
            for source, n in state["rows"]["broken"].items():
                broken[source] = broken.get(source, 0) + n
        self.counter.restore({"rows": sum(state["rows"]["rows"] for state in states), "broken": broken})
        self.n_left_out = sum(state["left_out"] for state in states)

    def figures(self) -> dict[str, int]:
        """What the batches since the last call held and had room for; and of the whole run the rows that were read, and
        those that were left out."""
        figures = dict(self.sums)
        if self.recipe.packing is not None:
            figures["capacity"] = self.sums["batches"] * self.recipe.packing.max_tokens
        self.sums = dict.fromkeys(self.sums, 0)
        return figures | {
            "rows": self.counter.n_rows,
            "broken_rows": sum(self.counter.n_broken.values()),
            "left_out": self.n_left_out,
        }


def describe_figures(figures: Mapping[str, int], seconds: float) -> dict[str, float]:
    """The figures of PackedBatches, of one rank or added up, as a line of the log has them. fill: the share of
    max_tokens that the packs held."""
    rates = {f"{name}_per_s": round(figures[name] / max(seconds, 1e-9), 2) for name in ("samples", "tokens")}
    fill = {"fill": round(figures["tokens"] / figures["capacity"], 4)} if figures.get("capacity") else {}
    return rates | fill | {name: figures[name] for name in ("rows", "broken_rows", "left_out")}


def build_batches(
    task: TrainingTask,
    recipe: TrainConfig,
    groups: Sequence[MixGroup] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> BatchSource:
    """The batches of one rank: of the recipe's `data`, which is opened unless `groups` is given, or of the task's own.

    Raises ValueError for a task that does not make the batches that the recipe asks for.
    """
    if recipe.data is None:
        if not isinstance(task, StepTask):
            raise ValueError(
                f"got no data for the task {recipe.task!r}, which trains on records: add data to the recipe"
            )
        return StepBatches(task.batch, rank=rank, world_size=world_size)
    if not isinstance(task, RecordTask):
        raise ValueError(f"got data for the task {recipe.task!r}, which trains on no records: leave it out")
    groups = open_groups(recipe.data) if groups is None else groups
    check_usable(groups, task.sample_builder, recipe)
    return PackedBatches(groups, task.sample_builder, recipe, rank=rank, world_size=world_size)


def check_usable(groups: Sequence[MixGroup], builder: SampleBuilder[Any], recipe: TrainConfig) -> None:
    """Raise ValueError for a group of which none of the rows that are tried can be used: one for another kind of model."""
    stream = DataMix(groups, builder.prepare, seed=recipe.seed).stream()
    for group in groups:
        reasons = []
        for _ in range(min(TRIED_ROWS, sum(source.n_rows for source in group.sources))):
            item = stream.draw(group.name).item
            if isinstance(item, BrokenRow):
                reasons.append(str(item))
            elif recipe.packing is not None and item.n_tokens > recipe.packing.max_tokens_per_sample:
                reasons.append(f"{item.n_tokens} tokens, expected at most packing.max_tokens_per_sample")
            else:
                break
        else:
            raise ValueError(
                f"data.groups.{group.name}: none of {len(reasons)} rows that were tried can be used by the task "
                f"{recipe.task!r}; the first: {reasons[0]}"
            )


def workers_for(n_lanes: int, workers: int) -> int:
    """The most processes, no more than `workers`, that take the lanes by turns: a divisor of their number, or 0."""
    return max((n for n in range(1, min(n_lanes, workers) + 1) if n_lanes % n == 0), default=0)
