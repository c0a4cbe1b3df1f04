"""The command `unimm plan`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from unimm.training.memory import MemoryPlan

GIB = 2**30


def plan_command(
    *,
    train: Annotated[str, typer.Option("--train", help="A recipe: a YAML file, or the name of one of ours.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Devices of the run, as torchrun starts them.")] = 1,
    device: Annotated[str, typer.Option(help="Their type, whose kernels are planned with: cuda or cpu.")] = "cuda",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the recipe's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Predict how much memory a training takes of each device, without weights, data or devices."""
    from unimm.training.config import name_source, read_recipe, recipe_path
    from unimm.training.memory import plan_recipe

    path = recipe_path(train)
    recipe = read_recipe(path, settings=set_ or ())
    with Console(stderr=True).status("a step without values"), name_source(str(path)):
        plan = plan_recipe(recipe, device_type=device, n_devices=gpus)
    if as_json:
        typer.echo(json.dumps(plan.to_json()))
    else:
        print_plan(Console(), train, plan)


def print_plan(console: Console, recipe: str, plan: "MemoryPlan") -> None:
    """Print what each device holds, in GiB."""
    devices = (
        "one device" if plan.n_devices == 1 else f"each of {plan.n_devices} devices, weights in {plan.n_shards} shards"
    )
    console.print(f"{Path(recipe).name} on {devices} ({plan.device_type}), in GiB, predicted")
    table = Table(show_header=False)
    for name, n_bytes in plan.parts().items():
        if n_bytes:
            table.add_row(name, f"{n_bytes / GIB:.2f}")
    table.add_row("peak of a step", f"{plan.total / GIB:.2f}", style="bold")
    if plan.offloaded:
        table.add_row("in the CPU's memory", f"{plan.offloaded / GIB:.2f}")
    console.print(table)
    console.print(
        f"{plan.n_trained:,} of {plan.n_parameters:,} parameters are trained, on {plan.n_tokens} tokens a batch. The "
        "allocator's gaps and the libraries' own memory are left out."
    )
