"""The batches of one rank, made ahead of the loop by worker processes, and signals that end the loop after its step."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
# how often a worker looks whether the main process is there
ORPHAN_CHECK_SECONDS = 1.0


class BatchSource(Protocol):
    """The batches of one rank, in order. A step takes `gradient_accumulation` of them on every rank."""

    def iterate(self, start: int, stop: int, *, workers: int) -> Generator[Any, None, None]:
        """Yield this rank's batches number start ... stop - 1, made ahead by worker processes, which closing it ends.

        Raises what making a batch raises.
        """

    def state_dict(self) -> dict[str, Any]:
        """Where the batches go on after the last one that was yielded; plain values and tensors."""

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where the ranks of another run stood: their states, in order, as many as it had ranks."""

    def figures(self) -> dict[str, int]:
        """What the batches since the last call held, for the log; may be added up over ranks. None for batches of a
        known size."""


class StepBatches:
    """Batches that are a pure function of their number: batch m of rank r has the number m * world_size + r."""

    def __init__(self, batch: Callable[[int], Any], *, rank: int = 0, world_size: int = 1) -> None:
        self.batch = batch
        self.rank = rank
        self.world_size = world_size
        # batches that all ranks have had; None where no run was loaded: as many as come before the first one asked for
        self.n_consumed: int | None = None

    def iterate(self, start: int, stop: int, *, workers: int) -> Generator[Any, None, None]:
        """Yield this rank's batches number start ... stop - 1."""
        if self.n_consumed is None:
            self.n_consumed = start * self.world_size
        first = self.n_consumed + self.rank
        numbers = range(first, first + (stop - start) * self.world_size, self.world_size)
        with closing(iterate_batches(self.batch, numbers, workers=workers)) as made:
            for batch in made:
                self.n_consumed += self.world_size
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """How many batches all ranks have had."""
        return {"n_consumed": self.n_consumed}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on after these, on any number of ranks."""
        self.n_consumed = states[0]["n_consumed"]

    def figures(self) -> dict[str, int]:
        """None: each batch holds what the recipe says."""
        return {}


def group_batches(batches: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The batches in groups of `size`, as a step takes them; what is left over at the end is dropped."""
    group: list[Item] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


@dataclass(frozen=True)
class BatchError:
    """An error raised while a batch was made, to be raised again in the main process."""

    error: Exception


class BatchDataset(Dataset[Any]):
    """Batches by number, for a DataLoader."""

    def __init__(self, batch: Callable[[int], Any]) -> None:
        self.batch = batch

    def __getitem__(self, number: int) -> Any:
        try:
            return self.batch(number)
        except (ValueError, TypeError, LookupError, OSError, RuntimeError, ArithmeticError) as error:
            # raised again in `iterate_batches`: the loader would wrap its message in a worker's trace
            return BatchError(error)


def iterate_batches(batch: Callable[[int], Any], numbers: range, *, workers: int) -> Generator[Any, None, None]:
    """Yield the batches of these numbers, in order, made ahead by worker processes, which closing it ends.

    Raises what `batch` raises.
    """
    loader = DataLoader(
        BatchDataset(batch),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=start_worker,
        # its own generator, so that starting workers does not move the global one and with it a resumed run
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    try:
        for made in iterator:
            if isinstance(made, BatchError):
                raise made.error
            yield made
    finally:
        end_workers(iterator)


def end_workers(iterator: Any) -> None:
    """End the processes of a DataLoader's iterator now. An error that holds the iterator would keep them: they ignore the
    signal by which Python ends them at its exit, and it would wait for them for ever."""
    if (end := getattr(iterator, "_shutdown_workers", None)) is not None:
        end()


def start_worker(worker: int) -> None:
    """Prepare a process that makes batches: it leaves signals to the main process, and ends when that has ended."""
    # ctrl-C and SIGTERM reach all processes, and the main one must still get its batches to reach a checkpoint
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = report_unless_disconnected
    threading.Thread(target=exit_with_main_process, daemon=True).start()


def report_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that nothing caught, but for a lost connection: the thread that hands over tensors meets one where the
    main process, which says itself what happened, turns to an error while it fetches them."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def exit_with_main_process() -> None:
    """End this process when the one that started it has ended, however that came.

    A worker of a DataLoader looks for that, too, but between batches alone: one that is sending a batch larger than a
    pipe's buffer to a process that was killed would wait for it for ever.
    """
    main = multiprocessing.parent_process()
    while main is not None and os.getppid() == main.pid:
        time.sleep(ORPHAN_CHECK_SECONDS)
    os._exit(1)


class StopSignal:
    """Turns a first SIGTERM or ctrl-C into a request that the loop reads after its step; a second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # python allows handlers in the main thread only
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous_handlers[number] = signal.signal(number, self.request)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}

    def request(self, number: int, frame: FrameType | None) -> None:
        """Answer a signal."""
        self.requested = True
        logger.warning("got %s: saving a checkpoint after this step", signal.Signals(number).name)
        signal.signal(number, self.previous_handlers[number])
