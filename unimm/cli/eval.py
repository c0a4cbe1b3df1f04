"""The command `unimm eval`."""

import dataclasses
import difflib
import json
from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from unimm.cli.options import DeviceOption, DtypeOption, ModelOption, SeedOption, load_model

# name -> module with `evaluate` and `supported_tasks`
BENCHMARKS = {"shapes": "unimm.evaluation.benchmarks.shapes"}


def eval_command(
    benchmark: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}.")],
    *,
    model: ModelOption = "bagel-nano",
    n: Annotated[int, typer.Option(help="Examples a task.")] = 500,
    seed: SeedOption = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    tasks: Annotated[str | None, typer.Option(help="Some of the tasks, with commas between; all unless given.")] = None,
    batch: Annotated[int, typer.Option(help="Examples at a time; scores do not depend on it.")] = 50,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Score a model: accuracy on unseen examples, with 95 % intervals."""
    if benchmark not in BENCHMARKS:
        nearest = difflib.get_close_matches(benchmark, BENCHMARKS, n=1) or list(BENCHMARKS)
        raise ValueError(f"unknown benchmark {benchmark!r}: expected {', '.join(nearest)}")
    module = import_module(BENCHMARKS[benchmark])
    loaded = load_model(model, device, dtype)
    chosen = tasks.split(",") if tasks else module.supported_tasks(loaded)
    scores = module.evaluate(loaded, n=n, seed=seed, tasks=chosen, batch_size=batch)
    if as_json:
        typer.echo(json.dumps({task: dataclasses.asdict(score) for task, score in scores.items()}))
        return
    table = Table("task", "accuracy", "95 % interval", "n", title=f"{benchmark}, {model}, seed {seed}")
    for task, score in scores.items():
        table.add_row(task, f"{score.accuracy:.3f}", f"{score.low:.3f} - {score.high:.3f}", str(score.n))
    Console().print(table)
