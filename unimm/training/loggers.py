"""Where a run is seen beside its log.jsonl: TensorBoard and Weights & Biases, which a recipe asks for by `loggers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from unimm.checkpoint.atomic import atomic_file
from unimm.training.config import TrainConfig
from unimm.training.logging import JsonlLog

# below a run's folder
TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb_id.txt"
# seconds that TensorBoard may keep what was logged
FLUSH_SECONDS = 20
SAMPLES = "samples"


class MetricLogger(Protocol):
    """A program that shows the numbers and the sample images of a run."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step by their names."""

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """Show an image of a step."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoardLogger:
    """Events for TensorBoard in the run's folder. Those of a resumed run after the checkpoint are replaced."""

    def __init__(self, out: Path, recipe: TrainConfig, *, after: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self.writer = SummaryWriter(str(out / TENSORBOARD_FOLDER), purge_step=after + 1, flush_secs=FLUSH_SECONDS)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        pixels = np.asarray(image.convert("RGB"))
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """A run of Weights & Biases, which a resumed run goes on with. Its own variables, WANDB_PROJECT, WANDB_MODE and the
    like, say where it goes."""

    def __init__(self, out: Path, recipe: TrainConfig, *, after: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        self.wandb: Any = wandb
        id_file = out / WANDB_ID_FILE
        known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() and after else None
        self.run: Any = wandb.init(
            dir=str(out), name=out.resolve().name, config=dataclasses.asdict(recipe), id=known, resume="allow"
        )
        # steps that a resumed run takes again are logged again, which wandb's own count of steps would drop
        self.run.define_metric("*", step_metric="step")
        with atomic_file(id_file) as partial:
            partial.write_text(self.run.id + "\n", encoding="utf-8")

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        self.run.log({"step": step, name: self.wandb.Image(image)})

    def close(self) -> None:
        self.run.finish()


LOGGERS: Mapping[str, Callable[..., MetricLogger]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}


def _missing(name: str) -> ValueError:
    return ValueError(
        f"got the logger {name!r} in loggers of the recipe, which is not installed: pip install 'unimm[{name}]', or "
        "leave it out"
    )


class RunLog:
    """The log of a run: log.jsonl, and the loggers that its recipe asks for."""

    def __init__(self, out: Path, recipe: TrainConfig, *, after: int) -> None:
        """after: the step that the run goes on from; what was logged of later ones is written again.

        Raises ValueError for a logger that is not installed.
        """
        self.loggers: list[MetricLogger] = [LOGGERS[name](out, recipe, after=after) for name in recipe.loggers]
        self.jsonl = JsonlLog(out / "log.jsonl", after=after)

    def write(self, report: Mapping[str, Any]) -> None:
        """Log the numbers of a step; `report` has its number as "step"."""
        self.jsonl.write(report)
        values = dict(flat_numbers(report))
        step = int(values.pop("step"))
        for logger in self.loggers:
            logger.log_metrics(step, values)

    def write_image(self, step: int, image: Image.Image | None) -> None:
        """Show a sample image, which lies in a file of its own already; a task may have none."""
        if image is None:
            return
        for logger in self.loggers:
            logger.log_image(step, SAMPLES, image)

    def close(self) -> None:
        """End what the loggers hold open."""
        for logger in self.loggers:
            logger.close()


def flat_numbers(report: Mapping[str, Any], prefix: Sequence[str] = ()) -> Iterator[tuple[str, float]]:
    """The numbers of a report by name; those of a section have its name before theirs, as losses/draw."""
    for name, value in report.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, (*prefix, name))
        elif not isinstance(value, str):
            yield "/".join((*prefix, name)), value
