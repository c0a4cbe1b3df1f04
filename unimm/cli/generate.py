"""The command `unimm generate`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unimm.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    OffloadOption,
    QuantizeOption,
    SeedOption,
    TensorParallelOption,
    chosen_shard,
    computing_ranks,
    load_model,
    load_options,
    look_up_family,
)

if TYPE_CHECKING:
    from unimm.models.base import Generation
    from unimm.models.load_options import LoadOptions


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
    tensor_parallel: TensorParallelOption = False,
) -> None:
    """Generate an image, or edit one; or draw a file of prompts, under torchrun by several processes."""
    if (prompt is None) == (prompts is None):
        raise ValueError(f"got {'neither' if prompt is None else 'both'}: expected a prompt, or --prompts with a file")
    height_width = parse_height_width(size) if size else None
    loading = load_options(device, dtype, quantize=quantize, offload=offload)
    if prompts is not None:
        if image:
            raise ValueError("got --image with --prompts: expected images in the file, under the key images")
        asked = PromptFile(path=prompts, seed=seed, n=n, think=think, size=height_width, steps=steps)
        draw_prompts(asked, out, model, loading, batch=batch, tensor_parallel=tensor_parallel)
        return
    if batch is not None:
        raise ValueError(f"got --batch {batch} without --prompts: expected a file of prompts")
    if n < 1:
        raise ValueError(f"got -n {n}: expected at least 1")
    check_writable(out)
    with computing_ranks(loading, together=tensor_parallel) as (ranks, loading):
        loaded = load_model(model, loading, ranks=ranks if tensor_parallel else None)
        options = loaded.supported_options(think=think, steps=steps)
        generated = loaded.generate(
            prompt, images=image or None, n=n, size=height_width, seed=seed, progress=ranks.is_first, **options
        )
    if ranks.is_first:
        save_images(generated, out)


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """A file of prompts. seed: of its first image; n, think, size: of lines that do not say; steps: of all."""

    path: Path
    seed: int
    n: int
    think: bool
    size: tuple[int, int] | None
    steps: int | None


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
    asked: PromptFile,
    out: Path,
    model: str,
    loading: "LoadOptions",
    *,
    batch: int | None,
    tensor_parallel: bool,
) -> None:
    """Draw a file of prompts into a folder: as one process, by parts as torchrun's, or all of these together."""
    if out.suffix:
        raise ValueError(f"got --out {out} with --prompts: expected a folder")
    from unimm.evaluation.prompts import read_prompt_requests, run_prompts
    from unimm.evaluation.setup import model_source, shared_source

    items = read_prompt_requests(asked.path, seed=asked.seed, n=asked.n, think=asked.think)
    family = look_up_family(model)
    family.supported_options(think=any(item.think for item in items))
    options = family.supported_options(steps=asked.steps)
    if asked.size is not None:
        options["size"] = asked.size
    if tensor_parallel:
        with computing_ranks(loading, together=True) as (ranks, on_cpu):
            plain = model_source(model, "prompts", load=on_cpu, options=options)
            with shared_source(plain, model, on_cpu, ranks) as source:
                if source is not None:
                    typer.echo(run_prompts(items, source, out, batch_size=batch).manifest)
        return
    with chosen_shard(None) as (part, place):
        loading = replace(loading, device=place(loading.device))
        source = model_source(model, "prompts", load=loading, options=options)
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
