"""The command `unimm stars`."""

import json
import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from unimm.cli.options import DeviceOption
from unimm.cli.train import log_to_stderr


def stars_command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe of ours: stars-nano.")],
    out: Annotated[Path, typer.Argument(help="The run's folder, in which it goes on after a stop.")],
    *,
    device: DeviceOption = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="Processes that make batches of the training ahead.")] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value over the recipe's: levels=[math1,math2], train.steps=50."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Let a model that thinks teach itself to generate without thinking: STARS."""
    from unimm.checkpoint.devices import parse_device
    from unimm.self_training.config import STARS_RECIPES, read_stars_recipe
    from unimm.self_training.report import stars_markdown
    from unimm.self_training.run import run_stars
    from unimm.training.config import recipe_path

    config = read_stars_recipe(recipe_path(recipe, folder=STARS_RECIPES), settings=set_ or ())
    parse_device(device)  # before anything is loaded
    with log_to_stderr("unimm", level=logging.INFO):
        result = run_stars(config, out, device=device, workers=workers)
    typer.echo(json.dumps(result) if as_json else stars_markdown(result))
    where = f"saved {out / 'result.json'} and {out / 'result.md'}"
    Console(stderr=True).print(Text(where), soft_wrap=True)
