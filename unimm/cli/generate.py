"""The command `unimm generate`."""

from pathlib import Path
from typing import Annotated

import typer

from unimm.cli.options import DeviceOption, DtypeOption, ModelOption, SeedOption, load_model


def generate_command(
    prompt: Annotated[str, typer.Argument(help="What to generate; with --image, how to edit it.")],
    *,
    image: Annotated[list[Path] | None, typer.Option(help="An image to edit; may be given several times.")] = None,
    think: Annotated[bool, typer.Option("--think", help="Write the reasoning first.")] = False,
    model: ModelOption = "bagel-nano",
    seed: SeedOption = 0,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the sampler; the model's own number unless given.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels.", metavar="HxW")] = None,
    n: Annotated[int, typer.Option("-n", help="How many images, from this seed and the ones after it.")] = 1,
    out: Annotated[Path, typer.Option(help="A file; several images are numbered before its suffix.")] = Path("out.png"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Generate an image, or edit one."""
    if n < 1:
        raise ValueError(f"got -n {n}: expected at least 1")
    height_width = parse_height_width(size) if size else None
    check_writable(out)
    loaded = load_model(model, device, dtype)
    generated = loaded.generate(
        prompt,
        images=image or None,
        n=n,
        size=height_width,
        seed=seed,
        progress=True,
        **loaded.supported_options(think=think, steps=steps),
    )
    for i, one in enumerate(generated.images):
        path = out if n == 1 else out.with_stem(f"{out.stem}-{i + 1}")
        # without think mode there are no texts
        for text in generated.texts[i : i + 1]:
            typer.echo(text)
        one.save(path)
        typer.echo(path)


def parse_height_width(text: str) -> tuple[int, int]:
    """(height, width) from "64x96"."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"got --size {text!r}: expected HEIGHTxWIDTH in pixels, as in 64x64")
    return int(parts[0]), int(parts[1])


def check_writable(path: Path) -> None:
    """Raise ValueError, before any work is done, for an image file that could not be written."""
    from PIL import Image

    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"got --out {path}: expected an image file's suffix, as in out.png")
    if not path.parent.is_dir():
        raise ValueError(f"got --out {path}: there is no folder {path.parent}")
