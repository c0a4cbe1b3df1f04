"""The command `unimm`: demo, generate, understand, train, eval, releases.

What a user can put right is said in one line on stderr, with exit code 2. Results go to stdout, all else to stderr.
"""
import dataclasses
import difflib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Column, Table
from typer.core import TyperGroup

USER_ERRORS = (ValueError, NotImplementedError, MemoryError, OSError, FloatingPointError)
# name -> module with `evaluate`
BENCHMARKS = {"shapes": "unimm.evaluation.benchmarks.shapes"}


class Commands(TyperGroup):
    """Commands whose user errors end in a line, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command asked for."""
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            typer.echo(f"error: {told(error)}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands,
    help="Models that understand pictures and draw them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Model = Annotated[str, typer.Option(help="A bundled name, a folder, or a hub id owner/name.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]


def main() -> None:
    """The entry point."""
    app()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the sheet of pictures goes.")] = Path("demo.png"),
    model: Model = "bagel-nano",
    seed: Seed = 0,
) -> None:
    """Draw scenes with a nano model, ask about one, edit it, and draw one after thinking, where the model thinks."""
    from unimm.cli.demo import run

    run(out, Console(), model=model, seed=seed)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw; with --image, how to change it.")],
    *,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to edit; may be given several times.")] = None,
    think: Annotated[bool, typer.Option("--think", help="Write the reasoning first.")] = False,
    model: Model = "bagel-nano",
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler; the model's own number unless given.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels.", metavar="HxW")] = None,
    n: Annotated[int, typer.Option("-n", help="How many pictures, from this seed and the ones after it.")] = 1,
    out: Annotated[Path, typer.Option(help="A file; several pictures are numbered before its suffix.")] = Path("out.png"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Draw a picture, or edit one."""
    if n < 1:
        raise ValueError(f"got -n {n}: expected at least 1")
    hw = parse_size(size) if size else None
    writable(out)
    loaded = load_model(model, device, dtype)
    prompts, images = [prompt] * n, [image] * n if image else None
    drawn = loaded.generate(prompts, images=images, think=think, size=hw, seed=seed, steps=steps, progress=True)
    for i, picture in enumerate(drawn.images):
        path = out if n == 1 else out.with_stem(f"{out.stem}-{i + 1}")
        for text in drawn.texts[i : i + 1]:
            typer.echo(text)
        picture.save(path)
        typer.echo(path)


@app.command()
def understand(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="What to answer about it.")],
    *,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    model: Model = "bagel-nano",
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Answer a question about a picture."""
    answer = load_model(model, device, dtype).understand(image, question, stream=stream)
    for piece in answer if stream else [answer]:
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe of ours.")],
    out: Annotated[Path, typer.Argument(help="Folder for the log, samples, checkpoints and the release.")],
    *,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest checkpoint in OUT.")] = False,
    init: Annotated[Path | None, typer.Option(help="A run, or its checkpoint, whose averaged weights to start from.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make batches ahead.")] = 1,
    hours: Annotated[float | None, typer.Option(help="Stop after this time, with a checkpoint.")] = None,
) -> None:
    """Train a model by a recipe, on one device."""
    from unimm import training
    from unimm.training.config import read_recipe
    from unimm.training.tasks.base import build
    from unimm.training.trainer import train as run

    ours = Path(training.__file__).parent / "recipes" / f"{recipe}.yaml"
    plan = read_recipe(recipe if recipe.endswith((".yaml", ".yml")) else ours)
    with logged("unimm"):
        run(build(plan), plan, out, device=device, resume=resume, init=init, workers=workers, hours=hours)


@app.command("eval")
def evaluate(
    benchmark: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}.")],
    *,
    model: Model = "bagel-nano",
    n: Annotated[int, typer.Option(help="Examples a task.")] = 500,
    seed: Seed = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    tasks: Annotated[str | None, typer.Option(help="Some of the tasks, with commas between; all unless given.")] = None,
    batch: Annotated[int, typer.Option(help="Examples at a time; scores do not depend on it.")] = 50,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Score a model: accuracy on unseen examples, with 95 % intervals."""
    from importlib import import_module

    if benchmark not in BENCHMARKS:
        near = difflib.get_close_matches(benchmark, BENCHMARKS, n=1) or list(BENCHMARKS)
        raise ValueError(f"unknown benchmark {benchmark!r}: expected {', '.join(near)}")
    module, loaded = import_module(BENCHMARKS[benchmark]), load_model(model, device, dtype)
    chosen = tasks.split(",") if tasks else module.tasks_of(loaded)
    scores = module.evaluate(loaded, n=n, seed=seed, tasks=chosen, batch=batch)
    if as_json:
        typer.echo(json.dumps({task: dataclasses.asdict(score) for task, score in scores.items()}))
        return
    table = Table("task", "accuracy", "95 % interval", "n", title=f"{benchmark}, {model}, seed {seed}")
    for task, score in scores.items():
        table.add_row(task, f"{score.accuracy:.3f}", f"{score.low:.3f} - {score.high:.3f}", str(score.n))
    Console().print(table)


@app.command()
def releases() -> None:
    """List the released checkpoints that are known by name."""
    from unimm.models.registry import releases as known

    # a name that does not fit goes on in the next line, whole, so that it can be copied
    table = Table(Column("name", overflow="fold", ratio=2), "family", "parameters", "licence", Column("can", ratio=1), "where")
    for row in known():
        where, limit = "hub" if row.hub else "bundled", "" if row.commercial else ", no commercial use"
        table.add_row(row.name, row.family, amount(row.parameters), row.licence + limit, ", ".join(row.verbs), where)
    Console().print(table)


def told(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def load_model(name: str, device: str, dtype: str) -> Any:
    """The model, with a word on stderr while it loads."""
    with Console(stderr=True).status(f"loading {name}"):
        from unimm.models.registry import load

        return load(name, device=device, dtype=dtype)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "64x96"."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"got --size {text!r}: expected HEIGHTxWIDTH in pixels, as in 64x64")
    return int(parts[0]), int(parts[1])


def writable(path: Path) -> None:
    """Raises ValueError, before any work is done, for a picture's file that could not be written."""
    from PIL import Image

    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"got --out {path}: expected a picture's suffix, as in out.png")
    if not path.parent.is_dir():
        raise ValueError(f"got --out {path}: there is no folder {path.parent}")


def amount(n: int) -> str:
    """12800000 -> 12.8 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.1f} {letter}"
    return str(n)


@contextmanager
def logged(name: str) -> Iterator[None]:
    """Show a logger's lines on stderr, for the length of the body."""
    logger, handler = logging.getLogger(name), RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


if __name__ == "__main__":
    main()
