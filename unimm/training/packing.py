"""Samples of a mix of datasets put together to batches: as many as a number of tokens has room for, or a number of them.

docs/training.md, "Packing". The rule of packing is that of BAGEL (docs/originals/bagel.md, "Packing and recipe"), but for
samples that do not fit at the moment: they wait, none is lost.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from unimm.data.mix import Drawn
from unimm.data.records import BrokenRow, Record
from unimm.training.data_config import PackingConfig

# rows of which none could be used, one after the other, that end a run
MAX_UNUSABLE = 1000


class PackableSample(Protocol):
    """What a record became."""

    @property
    def n_tokens(self) -> int:
        """The rows that it takes of a pack."""


S = TypeVar("S", bound=PackableSample)


class SampleBuilder(Protocol[S]):
    """Makes samples of records, and batches of samples. It is sent to worker processes, so it should hold no model."""

    def prepare(self, record: Record, rng: random.Random) -> S:
        """The sample of a record; `rng` decides on wordings and dropout. Raises ValueError for one that will not do,
        which is a broken row."""

    def collate(self, samples: Sequence[S], rng: random.Random) -> Any:
        """The batch of some samples, on the CPU; `rng` decides on timesteps and noise."""


@runtime_checkable
class UniformSampleBuilder(SampleBuilder[S], Protocol[S]):
    """A builder whose batches are of samples that share something, as the size of their images."""

    def batch_key(self, sample: S) -> Hashable:
        """What the samples of a batch share."""


@runtime_checkable
class NumberedBatch(Protocol):
    """A batch that is told its number: of a task that changes on the way."""

    def with_number(self, number: int) -> Any:
        """The batch, which has this number among those of its rank."""


class SampleStream(Protocol[S]):
    """The draws of a mix (unimm.data.mix.MixStream)."""

    @property
    def mandatory(self) -> tuple[str, ...]:
        """The groups of which every batch has a sample beside the others."""

    def choose(self) -> str:
        """The group of the next draw."""

    def draw(self, group: str) -> Drawn[S]:
        """The group's next row."""


@dataclass(kw_only=True)
class SampleGroup(Generic[S]):
    """The samples of a batch, and what became of the rows that were read for it.

    left_out: messages on samples that are too long.
    """

    samples: list[Drawn[S]] = field(default_factory=list)
    n_tokens: int = 0
    n_rows: int = 0
    broken: list[BrokenRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, drawn: Drawn[S]) -> None:
        """Put a sample behind the others."""
        self.samples.append(drawn)
        self.n_tokens += token_count(drawn)


class Packer(ABC, Generic[S]):
    """Batches of samples, from the draws of a stream and the samples that wait from before."""

    def __init__(self, stream: SampleStream[S], waiting: Sequence[Drawn[S]] = ()) -> None:
        self.stream = stream
        self.waiting = list(waiting)

    @abstractmethod
    def next_group(self) -> SampleGroup[S]:
        """The samples of the next batch. Raises ValueError where MAX_UNUSABLE rows in turn are of no use."""

    def draw_usable(self, group: str, into: SampleGroup[S], *, most: int, limit: str) -> Drawn[S]:
        """The next sample of a group that is whole and has at most so many tokens; the others are counted.

        limit: what says `most`, for the message.
        """
        for _ in range(MAX_UNUSABLE):
            drawn = self.stream.draw(group)
            into.n_rows += 1
            if isinstance(drawn.item, BrokenRow):
                into.broken.append(drawn.item)
            elif token_count(drawn) > most:
                into.left_out.append(
                    f"row {drawn.row} of the group {group} has {token_count(drawn)} tokens, expected at most {most} "
                    f"({limit})"
                )
            else:
                return drawn
        last = into.left_out[-1] if into.left_out else str(into.broken[-1])
        raise ValueError(
            f"{MAX_UNUSABLE} rows in turn of the group {group} are broken or too long; the last: {last}: mend the data, "
            "or raise the limit"
        )


class TokenPacker(Packer[S]):
    """Packs of at least `expected_tokens`, where the samples allow it, and never more than `max_tokens`.

    A pack begins with a sample of every mandatory group. As long as it has fewer than `prefer_buffer_before` tokens, or
    the buffer is full, the first sample of the buffer that fits comes before a new draw. A drawn sample that does not fit
    goes to the buffer; where that is full, the pack is done.
    """

    def __init__(self, stream: SampleStream[S], packing: PackingConfig, waiting: Sequence[Drawn[S]] = ()) -> None:
        super().__init__(stream, waiting)
        self.packing = packing

    def next_group(self) -> SampleGroup[S]:
        packing = self.packing
        pack: SampleGroup[S] = SampleGroup()
        for group in self.stream.mandatory:
            pack.add(self._mandatory_sample(group, pack))
        was_overfull = len(self.waiting) > packing.buffer_size
        any_taken = False
        while pack.n_tokens < packing.expected_tokens:
            at = self._waiting_that_fits(pack)
            if at is not None:
                pack.add(self.waiting.pop(at))
                any_taken = True
                continue
            most = packing.max_tokens_per_sample
            drawn = self.draw_usable(self.stream.choose(), pack, most=most, limit="max_tokens_per_sample")
            if pack.n_tokens + token_count(drawn) <= packing.max_tokens:
                pack.add(drawn)
                continue
            self.waiting.append(drawn)
            if len(self.waiting) > packing.buffer_size:
                if was_overfull and not any_taken:
                    # the mandatory samples leave no room for any that waits: the buffer would grow for ever
                    pack.left_out.append(self._without_room(self.waiting.pop(0)))
                break
        return pack

    def _without_room(self, drawn: Drawn[S]) -> str:
        return (
            f"row {drawn.row} of the group {drawn.group} has {token_count(drawn)} tokens, for which max_tokens leaves no "
            "room beside the samples of the mandatory groups"
        )

    def _mandatory_sample(self, group: str, pack: SampleGroup[S]) -> Drawn[S]:
        room = self.packing.max_tokens - pack.n_tokens
        most = min(self.packing.max_tokens_per_sample, room)
        limit = "max_tokens_per_sample" if most < room else "what max_tokens leaves for it"
        return self.draw_usable(group, pack, most=most, limit=limit)

    def _waiting_that_fits(self, pack: SampleGroup[S]) -> int | None:
        """The place in the buffer of the sample to take next."""
        is_full = len(self.waiting) >= self.packing.buffer_size
        if not (is_full or pack.n_tokens < self.packing.prefer_buffer_before):
            return None
        room = self.packing.max_tokens - pack.n_tokens
        return next((i for i, one in enumerate(self.waiting) if token_count(one) <= room), None)


class FixedSizeBatcher(Packer[S]):
    """Batches of a number of samples, each beginning with one of every mandatory group."""

    def __init__(self, stream: SampleStream[S], batch_size: int) -> None:
        super().__init__(stream)
        if len(stream.mandatory) > batch_size:
            raise ValueError(
                f"got batch_size {batch_size} and the mandatory groups {', '.join(stream.mandatory)}: expected a sample "
                "for each"
            )
        self.batch_size = batch_size

    def next_group(self) -> SampleGroup[S]:
        batch: SampleGroup[S] = SampleGroup()
        n_chosen = self.batch_size - len(self.stream.mandatory)
        for group in (*self.stream.mandatory, *(self.stream.choose() for _ in range(n_chosen))):
            batch.add(self.draw_usable(group, batch, most=NO_LIMIT, limit=""))
        return batch


class UniformBatcher(Packer[S]):
    """Batches of a number of samples of one key each; samples of other keys wait until there are enough of theirs.

    key: of a sample. No batch can begin with a sample of each group, so there are no mandatory groups.
    """

    def __init__(
        self,
        stream: SampleStream[S],
        batch_size: int,
        key: Callable[[S], Hashable],
        waiting: Sequence[Drawn[S]] = (),
    ) -> None:
        super().__init__(stream, waiting)
        if stream.mandatory:
            raise ValueError(
                f"got the mandatory groups {', '.join(stream.mandatory)}, and batches of samples of one size: expected none; "
                "leave mandatory out"
            )
        self.batch_size = batch_size
        self.key = key

    def next_group(self) -> SampleGroup[S]:
        batch: SampleGroup[S] = SampleGroup()
        while (chosen := self._enough()) is None:
            self.waiting.append(self.draw_usable(self.stream.choose(), batch, most=NO_LIMIT, limit=""))
        # by what they are: samples are not compared
        taken = {id(one) for one in chosen}
        self.waiting = [one for one in self.waiting if id(one) not in taken]
        for one in chosen:
            batch.add(one)
        return batch

    def _enough(self) -> list[Drawn[S]] | None:
        """As many samples of one key as a batch has, the first that waited; None where there are not enough of any."""
        found: dict[Hashable, list[Drawn[S]]] = {}
        for one in self.waiting:
            same = found.setdefault(self.key(whole_sample(one)), [])
            same.append(one)
            if len(same) == self.batch_size:
                return same
        return None


NO_LIMIT = 2**62


def token_count(drawn: Drawn[S]) -> int:
    """The tokens of a sample that is whole."""
    return whole_sample(drawn).n_tokens


def whole_sample(drawn: Drawn[S]) -> S:
    """What was drawn, which is no broken row."""
    assert not isinstance(drawn.item, BrokenRow), "broken rows are left out where they are drawn"
    return drawn.item
