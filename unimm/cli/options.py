"""Options that several commands share, the model that they name, and the part of a run that is this process's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from unimm.evaluation.sharding import RunShard
    from unimm.models.base import UnifiedModel

ModelOption = Annotated[str, typer.Option(help="A bundled name, a folder, or a hub id owner/name.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="float32 or bfloat16.")]
QuantizeOption = Annotated[str | None, typer.Option(help="Round the blocks' weights: int8, int4, fp8 or nf4.")]
OffloadOption = Annotated[
    str | None, typer.Option(help="cpu streams blocks to a GPU; disk leaves a CPU's weights in their files.")
]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same result.")]


def load_model(name: str, device: str, dtype: str, *, quantize: str | None = None, offload: str | None = None) -> Any:
    """The model of that name, with a status line on stderr while it loads."""
    with Console(stderr=True).status(f"loading {name}"):
        # imported here, so that `unimm --help` does not import torch
        from unimm.models.registry import load

        return load(name, device=device, dtype=dtype, quantize=quantize, offload=offload)


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
