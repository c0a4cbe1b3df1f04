"""The command `unimm generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unimm.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    OffloadOption,
    QuantizeOption,
    SeedOption,
    chosen_shard,
    load_model,
    look_up_family,
)

if TYPE_CHECKING:
    from unimm.models.base import Generation


def generate_command(
    prompt: Annotated[
        str | None, typer.Argument(help="What to generate; with --image, how to edit it.", show_default=False)
    ] = None,
    *,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts, .txt or .jsonl, drawn into the folder --out.")
    ] = None,
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
    batch: Annotated[int | None, typer.Option(help="With --prompts: images at a time.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    quantize: QuantizeOption = None,
    offload: OffloadOption = None,
) -> None:
    """Generate an image, or edit one; or draw a file of prompts, under torchrun by several processes."""
    if (prompt is None) == (prompts is None):
        raise ValueError(f"got {'neither' if prompt is None else 'both'}: expected a prompt, or --prompts with a file")
    height_width = parse_height_width(size) if size else None
    if prompts is not None:
        if quantize or offload:
            raise ValueError("got --quantize or --offload with --prompts: expected them for one prompt alone")
        if image:
            raise ValueError("got --image with --prompts: expected images in the file, under the key images")
        given = {} if height_width is None else {"size": height_width}
        draw_prompts(
            prompts,
            out,
            model,
            seed=seed,
            n=n,
            think=think,
            steps=steps,
            options=given,
            batch=batch,
            device=device,
            dtype=dtype,
        )
        return
    if batch is not None:
        raise ValueError(f"got --batch {batch} without --prompts: expected a file of prompts")
    if n < 1:
        raise ValueError(f"got -n {n}: expected at least 1")
    check_writable(out)
    loaded = load_model(model, device, dtype, quantize=quantize, offload=offload)
    options = loaded.supported_options(think=think, steps=steps)
    generated = loaded.generate(
        prompt, images=image or None, n=n, size=height_width, seed=seed, progress=True, **options
    )
    save_images(generated, out)


def save_images(generated: "Generation", out: Path) -> None:
    """Write images to the path, numbered if there are several, and print where they are, and the reasoning before."""
    for i, one in enumerate(generated.images):
        path = out if len(generated.images) == 1 else out.with_stem(f"{out.stem}-{i + 1}")
        # without think mode there are no texts
        for text in generated.texts[i : i + 1]:
            typer.echo(text)
        one.save(path)
        typer.echo(path)


def draw_prompts(
    path: Path,
    out: Path,
    model: str,
    *,
    seed: int,
    n: int,
    think: bool,
    steps: int | None,
    options: dict[str, Any],
    batch: int | None,
    device: str,
    dtype: str,
) -> None:
    """Draw a file of prompts into a folder, as one process or as torchrun's. options: of all its lines."""
    if out.suffix:
        raise ValueError(f"got --out {out} with --prompts: expected a folder")
    from unimm.evaluation.prompts import read_prompt_requests, run_prompts
    from unimm.evaluation.setup import model_source

    items = read_prompt_requests(path, seed=seed, n=n, think=think)
    family = look_up_family(model)
    family.supported_options(think=any(item.think for item in items))
    options |= family.supported_options(steps=steps)
    with chosen_shard(None) as (part, place):
        source = model_source(model, "prompts", device=place(device), dtype=dtype, options=options)
        state = run_prompts(items, source, out, shard=part, batch_size=batch)
        if part.index == 0:  # of torchrun's processes the first speaks
            typer.echo(state.manifest)


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
