"""The command `unimm train`."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from unimm.cli.options import DeviceOption


def train_command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe of ours.")],
    out: Annotated[Path, typer.Argument(help="Folder for the log, samples, checkpoints and the release.")],
    *,
    device: DeviceOption = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest checkpoint in OUT.")] = False,
    init: Annotated[
        str | None, typer.Option(help="A run, one of its checkpoints, or a release, whose weights to start from.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that make batches ahead.")] = 1,
    hours: Annotated[float | None, typer.Option(help="Stop after this time, with a checkpoint.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value over the recipe's: steps=100, data.groups.t2i.paths=[FOLDER]."),
    ] = None,
) -> None:
    """Train a model by a recipe, on one device, or started by torchrun on many."""
    from unimm.checkpoint.devices import parse_device
    from unimm.distributed.ranks import start_ranks
    from unimm.training.config import name_source, read_recipe, recipe_path
    from unimm.training.record_batches import open_groups
    from unimm.training.start import check_run
    from unimm.training.tasks.base import build_task
    from unimm.training.trainer import describe_run, train

    path = recipe_path(recipe)
    config = read_recipe(path, settings=set_ or ())
    found = parse_device(device)  # before anything is built
    check_run(out, resume=resume, init=init, workers=workers, hours=hours)
    with start_ranks(found) as ranks, log_to_stderr("unimm", level=logging.INFO if ranks.is_first else logging.WARNING):
        # before a large model is built
        ranks.check_equal(describe_run(config, resume=resume, init=init), what="settings")
        with name_source(str(path)):
            # first: a large model is built for minutes
            groups = None if config.data is None else open_groups(config.data)
            task = build_task(config)
        train(task, config, out, device=found, resume=resume, init=init, workers=workers, hours=hours, groups=groups)


class LineHandler(RichHandler):
    """Writes lines of a log. A RuntimeError that is raised meanwhile goes to the caller: where a worker has died, torch's
    signal handler raises one wherever the main process is, and logging would print its traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        if isinstance(error, RuntimeError):
            raise error
        super().handleError(record)


@contextmanager
def log_to_stderr(name: str, *, level: int) -> Iterator[None]:
    """Write a logger's lines from a level on to stderr for the length of the body."""
    logger = logging.getLogger(name)
    handler = LineHandler(console=Console(stderr=True), show_path=False, show_level=False)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
