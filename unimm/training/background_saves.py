"""Checkpoints that a thread writes, beside training: from copies of the tensors, in a group of ranks of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from unimm.distributed.ranks import Ranks

logger = logging.getLogger(__name__)


class BackgroundSaves:
    """What is written by a thread: one checkpoint at a time. All ranks call every method together."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.thread_ranks = ranks.for_thread()
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future[Path] | None = None

    def start(self, write: Callable[[Ranks], Path]) -> None:
        """Let a thread call `write` with the ranks to talk to, once what was started before is done."""
        self.wait()
        self.pending = self.executor.submit(write, self.thread_ranks)

    def check(self) -> None:
        """Raise, on every rank, what writing has raised on one, or note that it is done; does not wait for it."""
        if self.pending is None:
            return
        is_done = self.pending.done()
        n_done, n_failed = self.ranks.sum([is_done, is_done and self.pending.exception() is not None])
        if n_failed or n_done == self.ranks.size:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what writing raised."""
        pending = self.pending
        self.pending = None
        if pending is not None:
            pending.result()

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Wait, after the body, for what is being written. Where the body raises, its error is the one that is raised."""
        is_done = False
        try:
            yield
            is_done = True
        finally:
            if is_done:
                self.wait()
            elif self.pending is not None and (error := self.pending.exception()) is not None:
                logger.error("a checkpoint could not be written either: %s", error)
