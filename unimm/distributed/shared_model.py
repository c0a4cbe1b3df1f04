"""A model that several processes compute together, of whom the first calls it: the others follow its calls.

For work of which the first process alone knows what comes next, as it alone reads and writes the files of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from unimm.distributed.ranks import Ranks
from unimm.distributed.tensor_parallel import parallelize
from unimm.models.base import UnifiedModel

Result = TypeVar("Result")

# what a model raises for what it was asked, on every rank alike
REFUSALS = (ValueError, NotImplementedError)
# in place of a function and its arguments: the model is to be loaded
LOAD = "load"


class SharedModel:
    """The first rank's side of a model of which every rank has its part."""

    def __init__(self, model: UnifiedModel, ranks: Ranks):
        self.model = model
        self.ranks = ranks

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """What a function makes of the model and these arguments: it is called on all ranks, each with its part.

        function: of a module, since it is sent by its name.
        """
        self.ranks.broadcast((function, args))
        return function(self.model, *args)


@contextmanager
def shared_model(load: Callable[[], UnifiedModel], ranks: Ranks) -> Iterator[Callable[[], SharedModel] | None]:
    """On the first rank, what loads the model, which its body may call once; on the others, after they have followed all
    of its calls, None.

    load: gives the whole model, on the CPU. Raises what it and `parallelize` raise, on the first rank.
    """
    if not ranks.is_first:
        _follow(load, ranks)
        yield None
        return

    def load_shared() -> SharedModel:
        ranks.broadcast(LOAD)
        return SharedModel(_load_in_parts(load, ranks), ranks)

    try:
        yield load_shared
    finally:
        ranks.broadcast(None)


def _follow(load: Callable[[], UnifiedModel], ranks: Ranks) -> None:
    """Do what the first rank does until it has no more to do."""
    model = None
    while (call := ranks.broadcast(None)) is not None:
        # the first rank raises the same, and decides what comes next
        with suppress(*REFUSALS, OSError, MemoryError):
            if call == LOAD:
                model = _load_in_parts(load, ranks)
            else:
                function, args = call
                function(model, *args)


def _load_in_parts(load: Callable[[], UnifiedModel], ranks: Ranks) -> UnifiedModel:
    """The model, of which this rank has its part. Where one rank cannot load it, none goes on."""
    model = None
    error = None
    try:
        model = load()
    except (*REFUSALS, OSError, MemoryError) as found:  # raised again below, on every rank
        error = found
    errors = [one for one in ranks.gather(error) if one is not None]
    if error is not None or errors:
        raise error or errors[0]
    assert model is not None, "it was loaded, or an error was raised"
    parallelize(model, ranks)
    return model
