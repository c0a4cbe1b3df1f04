"""The processes of a run, one a device, and what they tell each other. A run of one process is one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")

# how long a rank waits for the others: the first may be sampling, or writing a release, meanwhile
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of a run."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # what they talk in; None for the group of all processes
    group: dist.ProcessGroup | None = None

    def for_thread(self) -> Ranks:
        """The same processes in a group of their own, in which a thread may talk beside the main one. All ask for it at
        once."""
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), "every rank is in it"
        return replace(self, group=group)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that logs and writes what all have in common."""
        return self.rank == 0

    def sum(self, values: Sequence[int]) -> list[int]:
        """The sums of whole numbers over all ranks."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether this is true on a rank."""
        return self.sum([int(flag)]) != [0]

    def sum_tensor(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order: values that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first rank's value: one that can be pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def run_first(self, function: Callable[[], Value]) -> Value:
        """Let the first rank call a function while the others wait: its value, or its error on every rank."""
        if self.size == 1:
            return function()
        value: Any = None
        error: Exception | None = None
        if self.is_first:
            try:
                value = function()
            except (ValueError, OSError, RuntimeError) as found:  # raised again below, on every rank
                error = found
        value, failed = self.broadcast((value, error))
        if failed is not None:
            raise error or failed
        return value

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def check_equal(self, values: dict[str, Any], *, what: str) -> None:
        """Raise ValueError on every rank, naming what differs, where not all have the same values."""
        everyones = self.gather(values)
        names = sorted({name for one in everyones for name in one})
        wrong = [name for name in names if any(one.get(name) != everyones[0].get(name) for one in everyones)]
        if wrong:
            shown = {name: [one.get(name) for one in everyones] for name in wrong[:3]}
            raise ValueError(
                f"the {self.size} processes of this run have other {what} in {', '.join(wrong)} ({shown!s:.500}): start "
                "all of them by the same command, files and version of unimm"
            )


@contextmanager
def start_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun has started, or this process alone; a device of CUDA is that of the rank.

    They are joined for the length of the body, unless they are already.
    """
    if dist.is_initialized():
        yield current_ranks(device)
        return
    if not dist.is_torchelastic_launched():
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    is_done = False
    try:
        yield current_ranks(device)
        is_done = True
    finally:
        # after an error NCCL would wait for the other ranks
        if is_done or backend == "gloo":
            dist.destroy_process_group()


def is_lost_connection(error: RuntimeError, ranks: Ranks) -> bool:
    """Whether an error is that of a connection to another rank; gloo has no class of its own for it."""
    return ranks.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def world_size() -> int:
    """How many processes are joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def current_ranks(device: torch.device) -> Ranks:
    """This process among those that are joined."""
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
