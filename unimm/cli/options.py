"""Options that several commands share, the model that they name, and the part of a run that is this process's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from unimm.distributed.ranks import Ranks
    from unimm.evaluation.sharding import RunShard
    from unimm.models.base import UnifiedModel
    from unimm.models.load_options import LoadOptions

ModelOption = Annotated[str, typer.Option(help="A bundled name, a folder, or a hub id owner/name.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="float32 or bfloat16.")]
QuantizeOption = Annotated[str | None, typer.Option(help="Round the blocks' weights: int8, int4, fp8 or nf4.")]
OffloadOption = Annotated[
    str | None, typer.Option(help="cpu streams blocks to a GPU; disk leaves a CPU's weights in their files.")
]
TensorParallelOption = Annotated[
    bool, typer.Option("--tensor-parallel", help="All processes of torchrun compute each image together.")
]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same result.")]


def load_options(device: str, dtype: str, *, quantize: str | None = None, offload: str | None = None) -> "LoadOptions":
    """How a command loads its models. Raises ValueError for what cannot be, before anything is fetched."""
    # imported here, so that `unimm --help` does not import torch
    from unimm.models.load_options import LoadOptions

    options = LoadOptions(device=device, dtype=dtype, quantize=quantize, offload=offload)
    options.check()
    return options


def load_model(name: str, options: "LoadOptions", *, ranks: "Ranks | None" = None) -> Any:
    """The model of that name, with a status line on stderr while it loads. ranks: those that compute it together."""
    with Console(stderr=True).status(f"loading {name}"):
        model = options.load(name)
        if ranks is not None:
            from unimm.distributed.tensor_parallel import parallelize

            parallelize(model, ranks)
        return model


@contextmanager
def computing_ranks(options: "LoadOptions", *, together: bool) -> Iterator[tuple["Ranks", "LoadOptions"]]:
    """The processes that compute a model, and how each loads it: all of torchrun's together, or this one alone.

    Raises ValueError for one process together, and for weights that are not split.
    """
    from unimm.checkpoint.devices import parse_device
    from unimm.distributed.ranks import Ranks, start_ranks

    if not together:
        yield Ranks(), options
        return
    if options.quantize or options.offload:
        raise ValueError("got --tensor-parallel with --quantize or --offload: expected one of them")
    with start_ranks(parse_device(options.device)) as ranks:
        if ranks.size == 1:
            raise ValueError(
                "got --tensor-parallel in one process: expected several, as by torchrun --nproc-per-node 2 -m unimm"
            )
        # no device holds all of it
        yield ranks, replace(options, device="cpu")


def look_up_family(model: str) -> type["UnifiedModel"]:
    """The class of a model, before it is loaded."""
    with Console(stderr=True).status(f"looking up {model}"):
        from unimm.evaluation.setup import find_family

        return find_family(model)


@contextmanager
def chosen_shard(text: str | None) -> Iterator[tuple["RunShard", Callable[[str], str]]]:
    """The shard that is named, or torchrun's, and what turns a device into this process's."""
    from unimm.evaluation.sharding import parse_shard, shard_device, torchrun_shard

    if text is not None:
        yield parse_shard(text), shard_device
        return
    with torchrun_shard() as shard:
        yield shard, shard_device
