"""Options that several commands share, and loading the model that they name."""

from typing import Annotated, Any

import typer
from rich.console import Console

ModelOption = Annotated[str, typer.Option(help="A bundled name, a folder, or a hub id owner/name.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="float32 or bfloat16.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same result.")]


def load_model(name: str, device: str, dtype: str) -> Any:
    """The model of that name, with a status line on stderr while it loads."""
    with Console(stderr=True).status(f"loading {name}"):
        # imported here, so that `unimm --help` does not import torch
        from unimm.models.registry import load

        return load(name, device=device, dtype=dtype)
