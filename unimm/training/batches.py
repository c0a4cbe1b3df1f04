"""Batches by step, made ahead of the loop by worker processes, and signals that end the loop after its step."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchError:
    """An error raised while a batch was made, to be raised again in the main process."""

    error: Exception


class BatchDataset(Dataset[Any]):
    """Batches by step, for a DataLoader."""

    def __init__(self, batch: Callable[[int], Any]) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> Any:
        try:
            return self.batch(step)
        except (ValueError, TypeError, LookupError, OSError, RuntimeError, ArithmeticError) as error:
            # raised again in `iterate_batches`: the loader would wrap its message in a worker's trace
            return BatchError(error)


def iterate_batches(batch: Callable[[int], Any], start: int, stop: int, *, workers: int) -> Generator[Any, None, None]:
    """Yield batch(start) ... batch(stop - 1), in order, made ahead by worker processes, which closing it ends.

    Raises what `batch` raises.
    """
    loader = DataLoader(
        BatchDataset(batch),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals,
        # its own generator, so that starting workers does not move the global one and with it a resumed run
        generator=torch.Generator(),
    )
    for made in loader:
        if isinstance(made, BatchError):
            raise made.error
        yield made


def ignore_signals(worker: int) -> None:
    """Let only the main process answer ctrl-C and SIGTERM: it must still get its batches to reach a checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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
