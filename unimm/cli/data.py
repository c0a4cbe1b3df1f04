"""The commands `unimm data ...`."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from unimm.cli.options import SeedOption

if TYPE_CHECKING:
    from unimm.data.check import DatasetReport, Spread

data_app = typer.Typer(help="Datasets to train on.", no_args_is_help=True)


@data_app.command("check")
def data_check_command(
    path: Annotated[Path, typer.Argument(help="A file or a folder.")],
    *,
    format: Annotated[str | None, typer.Option(help="Its format; recognised unless given.")] = None,  # noqa: A002
    tokenizer: Annotated[
        str | None, typer.Option(help="A model, or a folder with a tokenizer, to count tokens by.", metavar="MODEL")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="What columns are for, with commas between: target=image,text=caption.", metavar="USE=NAME"),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="The folder that names of images are relative to.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="A row with more tokens of text is broken.")] = None,
    max_broken: Annotated[
        float, typer.Option(min=0, max=1, help="The share of broken rows above which the exit code is 1.")
    ] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to read; all unless given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Read a dataset: counts, sizes, lengths, and broken rows with reasons. Exit code 1 for too many of these."""
    from unimm.data.check import check_dataset
    from unimm.data.sources.base import SourceOptions
    from unimm.data.sources.formats import open_source

    counted_by = load_named_tokenizer(tokenizer) if tokenizer else None
    options = SourceOptions(images=images, columns=parse_columns(columns) if columns else None)
    source = open_source(path, format=format, options=options)
    bar = None if as_json else progress_bar()
    with bar or nullcontext():
        task = bar.add_task(f"reading {path.name}", total=min(source.n_rows, limit or source.n_rows)) if bar else None
        report = check_dataset(
            source,
            tokenizer=counted_by,
            max_tokens=max_tokens,
            limit=limit,
            progress=None if bar is None or task is None else lambda n: bar.update(task, completed=n),
        )
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        print_report(Console(), report)
    if report.n_broken > max_broken * report.n_read:
        raise typer.Exit(1)


@data_app.command("unisandbox")
def data_unisandbox_command(
    out: Annotated[Path, typer.Argument(help="A folder for the files.")],
    *,
    n: Annotated[int, typer.Option("--n", help="Questions, or pairs of them, a level.")] = 100,
    seed: SeedOption = 1,
) -> None:
    """Make UniSandBox's reasoning tasks anew: other questions about photographs, in the format of its files."""
    from unimm.evaluation.benchmarks.unisandbox.benchmark import REASONING
    from unimm.evaluation.benchmarks.unisandbox.files import write_task
    from unimm.evaluation.benchmarks.unisandbox.generated import photo_questions

    for task in REASONING:
        typer.echo(write_task(out, task, photo_questions(task, n, seed=seed)))


@data_app.command("knowledge")
def data_knowledge_command(
    out: Annotated[Path, typer.Argument(help="A folder for the files.")],
    *,
    n: Annotated[int, typer.Option("--n", help="Characters, in pairs.")] = 10,
    reasoning: Annotated[
        int, typer.Option(help="Characters beside these, about whom a model is also taught to reason.")
    ] = 0,
    world: Annotated[str, typer.Option(help="Of what they look like and like: shapes, or photos.")] = "shapes",
    seed: SeedOption = 1,
) -> None:
    """Invent characters: texts that teach a model about them, and requests to draw what it was taught."""
    from unimm.data.knowledge.files import KnowledgeSet, write_knowledge
    from unimm.evaluation.benchmarks.unisandbox.knowledge import write_knowledge_benchmark

    made = KnowledgeSet.invent(n, n_reasoning=reasoning, world=world, seed=seed)
    for path in (write_knowledge_benchmark(out, made), *write_knowledge(out, made)):
        typer.echo(path)


def progress_bar() -> Progress:
    """On stderr, gone when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def parse_columns(text: str) -> dict[str, str]:
    """{"text": "caption"} from "text=caption"."""
    columns = {}
    for pair in text.split(","):
        use, _, name = (one.strip() for one in pair.partition("="))
        if not use or not name:
            raise ValueError(f"got --columns {pair!r}: expected USE=NAME, as in target=image,text=caption")
        columns[use] = name
    return columns


def load_named_tokenizer(model: str) -> Any:
    """The tokenizer of a model, without its weights. Raises ValueError where its folder holds none."""
    from unimm.checkpoint.hub import resolve
    from unimm.tokenizers.text import load_tokenizer

    folder = resolve(model, weights=False)
    places = [folder, *sorted(one.parent for one in folder.glob("*/tokenizer*"))]
    found = next((made for place in places if (made := load_tokenizer(place)) is not None), None)
    if found is None:
        expected = "tokenizer.json, vocab.json and merges.txt, or tokenizer.model"
        raise ValueError(f"no tokenizer in {folder}: expected {expected}")
    return found


def print_report(console: Console, report: "DatasetReport") -> None:
    """Print what a dataset holds, and its broken rows."""
    console.print(Text(f"{report.path}, format {report.format}", style="bold"), soft_wrap=True)
    table = Table(show_header=False)
    rows = f"{report.n_read}" if report.n_read == report.n_rows else f"{report.n_read} of {report.n_rows}"
    table.add_row("rows", rows)
    for kind, n in report.kinds.items():
        table.add_row(f"  {kind}", str(n))
    table.add_row("  broken", Text(str(report.n_broken), style="red" if report.n_broken else ""))
    table.add_row("images", f"{report.images}, of these {report.generated_images} to generate")
    for name, spread in (("widths", report.widths), ("heights", report.heights)):
        if spread is not None:
            table.add_row(f"  {name}", describe_spread(spread))
    if report.common_sizes:
        table.add_row("  commonest", ", ".join(f"{width}x{height} ({n})" for width, height, n in report.common_sizes))
    spreads = (
        ("characters a text", report.characters),
        ("tokens a text", report.tokens),
        ("tokens a row", report.row_tokens),
    )
    for name, spread in spreads:
        if spread is not None:
            table.add_row(name, f"{describe_spread(spread)}, {spread.total} in all")
    console.print(table)
    for row in report.broken:
        console.print(Text(str(row), style="red"), soft_wrap=True)
    if report.n_broken > len(report.broken):
        console.print(f"and {report.n_broken - len(report.broken)} more broken rows")


def describe_spread(spread: "Spread") -> str:
    """Numbers in short: "9", or "9 to 27, median 18"."""
    if spread.least == spread.most:
        return str(spread.least)
    return f"{spread.least} to {spread.most}, median {spread.median}"
