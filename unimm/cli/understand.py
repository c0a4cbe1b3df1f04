"""The command `unimm understand`."""

from pathlib import Path
from typing import Annotated

import typer

from unimm.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    OffloadOption,
    QuantizeOption,
    load_model,
    load_options,
)


def understand_command(
    image: Annotated[Path, typer.Argument(help="An image.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    *,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    model: ModelOption = "bagel-nano",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    quantize: QuantizeOption = None,
    offload: OffloadOption = None,
) -> None:
    """Answer a question about an image."""
    loaded = load_model(model, load_options(device, dtype, quantize=quantize, offload=offload))
    answer = loaded.understand(image, question, stream=stream)
    for piece in answer if stream else [answer]:
        typer.echo(piece, nl=False)
    typer.echo()
