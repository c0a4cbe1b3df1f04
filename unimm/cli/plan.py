"""The command `unimm plan`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unimm.cli.generate import parse_height_width

if TYPE_CHECKING:
    from unimm.training.memory import MemoryPlan

MIB = 2**20
GIB = 2**30
# from the most exact to the smallest
DTYPES = ("float32", "bfloat16")


def plan_command(
    name: Annotated[
        str | None, typer.Argument(help="A model that generates images: a name, a folder, or a hub id.")
    ] = None,
    *,
    train: Annotated[
        str | None,
        typer.Option("--train", help="A recipe to train by instead: a YAML file, or the name of one of ours."),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Devices of a training, as torchrun starts them.")] = 1,
    memory: Annotated[str | None, typer.Option(help="What the device has, as 24GB or 80GiB.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of an image in pixels.", metavar="HxW")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; both unless given.")] = None,
    device: Annotated[str, typer.Option(help="Its type, whose kernels are planned with: cuda or cpu.")] = "cuda",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the recipe's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Predict how much memory a model, or a training, takes of each device, without weights, data or devices."""
    available = parse_memory(memory) if memory else None
    if (name is None) == (train is None):
        raise ValueError(
            f"got {'neither a model nor' if name is None else 'both a model and'} --train: expected one of them"
        )
    if train is not None:
        if size or dtype or batch != 1 or available is not None:
            raise ValueError(
                "got --memory, --size, --batch or --dtype with --train: the recipe says these; leave them out"
            )
        plan_training(train, device, set_ or (), gpus=gpus, as_json=as_json)
        return
    if set_ or gpus != 1:
        raise ValueError("got --set or --gpus for a model: they are for the recipe of --train; leave them out")
    assert name is not None, "it was looked at"
    found = plan_generation(
        name, device, size=parse_height_width(size) if size else None, batch=batch, dtypes=(dtype,) if dtype else DTYPES
    )
    chosen = fitting_flags(found, available, device) if available is not None else None
    if as_json:
        typer.echo(json.dumps({"name": name, "memory": available, "flags": chosen, "plans": found}))
    else:
        print_generation(Console(), name, found, available, chosen)


def plan_training(train: str, device: str, settings: Sequence[str], *, gpus: int, as_json: bool) -> None:
    """Predict and print what a step of a recipe takes."""
    from unimm.training.config import name_source, read_recipe, recipe_path
    from unimm.training.memory import plan_recipe

    path = recipe_path(train)
    recipe = read_recipe(path, settings=settings)
    with Console(stderr=True).status("a step without values"), name_source(str(path)):
        plan = plan_recipe(recipe, device_type=device, n_devices=gpus)
    if as_json:
        typer.echo(json.dumps(plan.to_json()))
    else:
        print_plan(Console(), train, plan)


def plan_generation(
    name: str, device: str, *, size: tuple[int, int] | None, batch: int, dtypes: Sequence[str]
) -> list[dict[str, Any]]:
    """The plan in each dtype, and by other ways of loading in the last; of a hub repository that no family knows the
    weights alone, from its headers."""
    from unimm.checkpoint import hub
    from unimm.models.memory import hub_weights, plan_inference
    from unimm.models.registry import detect_family, releases

    with Console(stderr=True).status(f"generating with {name} without values"):
        folder = hub.resolve(name, known_names=tuple(row.name for row in releases()), weights=False)
        is_hub_id = hub.looks_like_hub_id(name) and not Path(name).is_dir()
        if detect_family(folder) is not None or not is_hub_id:
            found = [
                plan_inference(name, dtype=dtype, device_type=device, size=size, batch=batch, ways=dtype == dtypes[-1])
                for dtype in dtypes
            ]
            return [plan.to_json() for plans in found for plan in plans]
        counts = hub_weights(name)
    return [weights_alone(name, counts, dtype) for dtype in dtypes]


def weights_alone(name: str, counts: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """A plan of weights alone. counts: numbers of each dtype in the files."""
    import torch

    from unimm.checkpoint.load import parse_dtype

    n = sum(counts.values())
    n_bytes = n * torch.empty(0, dtype=parse_dtype(dtype)).itemsize
    return {
        "name": name,
        "dtype": dtype,
        "n_parameters": n,
        "files": dict(counts),
        "weights": n_bytes,
        "total": n_bytes,
    }


def parse_memory(text: str) -> int:
    """Bytes from "24GB", "80GiB" or a plain number. Raises ValueError for anything else."""
    from unimm.checkpoint.save import parse_bytes

    try:
        found = parse_bytes(int(text) if text.strip().isdecimal() else text)
    except ValueError as error:
        raise ValueError(
            f"got --memory {text!r}: expected a number of bytes, or one with a unit, as 24GB or 80GiB"
        ) from error
    assert found is not None, "a text is a size"
    return found


def fitting_flags(plans: Sequence[Mapping[str, Any]], available: int, device: str) -> str | None:
    """The flags of the first plan that fits, the most exact of them; None where none does."""
    fitting = next((plan for plan in plans if plan["total"] <= available), None)
    if fitting is None:
        return None
    chosen = {"dtype": fitting["dtype"], "device": device, **way_of_loading(fitting)}
    return " ".join(f"--{name} {value}" for name, value in chosen.items())


def way_of_loading(plan: Mapping[str, Any]) -> dict[str, str]:
    """How a plan's weights are loaded, other than as they are."""
    return {name: plan[name] for name in ("quantize", "offload") if plan.get(name)}


def _way_in_words(plan: Mapping[str, Any]) -> list[str]:
    return [f"offload {way}" if name == "offload" else way for name, way in way_of_loading(plan).items()]


def show_bytes(n: int) -> str:
    """A number of bytes in GiB, or in MiB below a tenth of one."""
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / MIB:.1f} MiB"


def print_generation(
    console: Console, name: str, plans: Sequence[Mapping[str, Any]], available: int | None, flags: str | None
) -> None:
    """Print what a device holds in each dtype, by each way of loading, and what fits."""
    first = plans[0]
    whole = "step" in first
    what = ""
    if whole:
        height, width = first["size"]
        images = f"{first['batch']} images" if first["batch"] > 1 else "an image"
        what = f" generating {images} of {height}x{width} on one device ({first['device_type']})"
    console.print(Text(f"{name},{what} predicted"), soft_wrap=True)
    table = Table("", *("\n".join((plan["dtype"], *_way_in_words(plan))) for plan in plans))
    rows = {"weights": "weights"}
    if whole:
        rows |= {"kv_cache": "KV cache", "step": "prefill and a step", "decode": "pixels of an image"}
    for key, label in rows.items():
        table.add_row(label, *(show_bytes(plan[key]) for plan in plans))
    table.add_row("peak", *(show_bytes(plan["total"]) for plan in plans), style="bold")
    if available is not None:
        table.add_row(
            f"in {show_bytes(available)}", *("fits" if plan["total"] <= available else "no" for plan in plans)
        )
    console.print(table)
    console.print(
        f"{first['n_parameters']:,} parameters. The allocator's gaps and the libraries' own memory are left out."
    )
    if not whole:
        console.print(
            "No family of this library knows its config: what is computed beside the weights is not predicted."
        )
    if available is not None:
        console.print(
            f"It fits with {flags}."
            if flags
            else "It does not fit: take fewer images at a time, smaller ones, or a larger device."
        )


def print_plan(console: Console, recipe: str, plan: "MemoryPlan") -> None:
    """Print what each device holds."""
    devices = (
        "one device" if plan.n_devices == 1 else f"each of {plan.n_devices} devices, weights in {plan.n_shards} shards"
    )
    console.print(f"{Path(recipe).name} on {devices} ({plan.device_type}), predicted")
    table = Table(show_header=False)
    for name, n_bytes in plan.parts().items():
        if n_bytes:
            table.add_row(name, show_bytes(n_bytes))
    table.add_row("peak of a step", show_bytes(plan.total), style="bold")
    if plan.offloaded:
        table.add_row("in the CPU's memory", show_bytes(plan.offloaded))
    console.print(table)
    console.print(
        f"{plan.n_trained:,} of {plan.n_parameters:,} parameters are trained, on {plan.n_tokens} tokens a batch. The "
        "allocator's gaps and the libraries' own memory are left out."
    )
