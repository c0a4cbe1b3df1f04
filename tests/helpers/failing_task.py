"""The toy as a task of a recipe, which fails at a step in the way that its options name."""

import functools
import os
import resource
import signal
import time
from pathlib import Path

import torch
import yaml

from helpers.trainer_toy import RECIPE, Toy
from unimm.training.checkpoints import list_checkpoints
from unimm.training.losses import LossSum

# bytes: less than the toy's weights
FILE_LIMIT = 500


def kill_this_process(out):
    """As the system does where memory runs out; once there is a checkpoint, since batches are made ahead."""
    while not list_checkpoints(Path(out)):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk(out):
    """As far as files are concerned."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))


FAILURES = {"worker": kill_this_process, "disk": fill_the_disk, "loss": None, "none": None}


class FailingToy(Toy):
    """The toy that fails in the batch after `at` steps of a run into `out`."""

    def __init__(self, how, at, out):
        action = FAILURES[how]
        super().__init__(at if action else None, functools.partial(action, out) if action else None)
        self.nan_at = at if how == "loss" else None
        self.n_batches = 0

    @classmethod
    def from_recipe(cls, recipe):
        return cls(recipe.options["how"], recipe.options["at"], recipe.options["out"])

    def losses(self, batch):
        losses = super().losses(batch)
        self.n_batches += 1
        if self.n_batches - 1 != self.nan_at:
            return losses
        return losses | {"near": LossSum(losses["near"].total * torch.nan, losses["near"].count)}


def recipe_text(how, at, out):
    """A recipe as YAML, of a run into `out`."""
    options = {"how": how, "at": at, "out": str(out)}
    values = vars(RECIPE) | {"task": "helpers.failing_task:FailingToy", "options": options, "log_every": 100}
    numbers = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return yaml.safe_dump({name: value for name, value in numbers.items() if value is not None})
