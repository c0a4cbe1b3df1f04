"""Which batches of a run are this process's: those of a shard, by hand or by torchrun."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunShard:
    """Part `index` of `count` of a run, counted from 0."""

    index: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        """As it is given and shown: 1/4, ..."""
        return f"{self.index + 1}/{self.count}"

    @property
    def suffix(self) -> str:
        """What its manifests' names end in; nothing for a run in one piece."""
        return "" if self.count == 1 else f"-{self.index + 1:05}-of-{self.count:05}"

    def pick(self, batches: Sequence[T]) -> list[T]:
        """This shard's batches."""
        return list(batches[self.index :: self.count])


def parse_shard(text: str) -> RunShard:
    """A shard from "i/n": 1/4 to 4/4 are the parts of a run in four."""
    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or not 1 <= int(index) <= int(count):
        raise ValueError(f"got --shard {text!r}: expected i/n with i from 1 to n, as in 1/4")
    return RunShard(index=int(index) - 1, count=int(count))


@contextmanager
def torchrun_shard() -> Iterator[RunShard]:
    """This process's shard of a run started by torchrun, or the whole; the body's end waits for the other processes."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield RunShard()
        return
    # a process waits at the end for the slowest one
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield RunShard(index=dist.get_rank(), count=dist.get_world_size())
    finally:
        dist.destroy_process_group()


def shard_device(device: str) -> str:
    """The device of this process: of torchrun's on one machine each takes a GPU of its own, where "cuda" is asked for."""
    import torch.distributed as dist

    if device == "cuda" and dist.is_available() and dist.is_initialized():
        return f"cuda:{dist.get_node_local_rank()}"
    return device


def wait_for_all(shard: RunShard) -> None:
    """Wait until every process of torchrun is here; a shard given by hand waits for nobody."""
    import torch.distributed as dist

    if shard.count > 1 and dist.is_available() and dist.is_initialized():
        dist.barrier()
