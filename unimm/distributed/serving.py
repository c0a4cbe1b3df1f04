"""Whole tensors for the first rank alone, one at a time: what it writes is never together on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from unimm.distributed.ranks import Ranks
from unimm.distributed.sharding import whole_tensor

# in place of a tensor's index: there is nothing more to gather
END = -1


def serve_tensors(ranks: Ranks, tensors: Sequence[Tensor], write: Callable[[Callable[[int], Tensor]], None]) -> None:
    """Let the first rank call `write` with a function from indices to whole tensors, which all ranks gather.

    Raises what `write` raises, on every rank.
    """

    def fetch(index: int) -> Tensor:
        ranks.sum([index])
        return whole_tensor(tensors[index])

    def serve() -> None:
        # the others add nothing to what the first says
        while (index := ranks.sum([0])[0]) != END:
            whole_tensor(tensors[index])

    error: Exception | None = None
    if ranks.is_first:
        try:
            write(fetch)
        except (ValueError, OSError, RuntimeError) as found:  # raised again below, on every rank
            error = found
        ranks.sum([END])
    else:
        serve()
    failed = ranks.broadcast(error)
    if failed is not None:
        raise error or failed
