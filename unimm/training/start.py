"""The start of a run: what it is told is checked before anything is built, and weights to start from are found."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unimm.checkpoint import hub
from unimm.generation.numbers import parse_float, parse_int
from unimm.models.base import UnifiedModel
from unimm.training.checkpoints import EMA_FILE, WEIGHTS_FILE, is_checkpoint, list_checkpoints, named_tensors

logger = logging.getLogger(__name__)


def check_run(out: Path, *, resume: bool, init: str | Path | None, workers: Any, hours: Any) -> tuple[int, float]:
    """The number of workers, and the time of `time.monotonic` at which to stop, of the arguments of a run.

    Raises ValueError for wrong ones, before anything is built: where a run would be overwritten, too.
    """
    workers = parse_int(workers, "workers", low=0)
    if hours is not None:
        hours = parse_float(hours, "hours", "a number of 0 or more", low=0)
    found = list_checkpoints(out)
    if resume and init is not None:
        raise ValueError("got both resume and init, expected one: resume continues a run, init starts another from it")
    if resume and not found:
        raise ValueError(f"got resume, but {out} holds no checkpoint: leave resume out to start the run")
    if found and not resume:
        raise ValueError(f"{out} holds a run of {int(found[-1].name)} steps: resume it, or choose another folder")
    if init is not None:
        initial_checkpoint(init)
    return workers, math.inf if hours is None else time.monotonic() + 3600 * hours


def initial_checkpoint(init: str | Path) -> Path | None:
    """The checkpoint to start from: the newest of a run, or the one that is given; None for a release.

    Raises ValueError for what is none of these.
    """
    folder = Path(init)
    if found := list_checkpoints(folder):
        return found[-1]
    if is_checkpoint(folder):
        return folder
    try:
        release = hub.resolve(init, weights=False)
    except ValueError as error:
        raise ValueError(f"got init {init}, expected a run, one of its checkpoints, or a release: {error}") from error
    if not (release / "config.json").is_file():
        raise ValueError(
            f"got init {init}, expected the folder of a run, that of a checkpoint, with files {WEIGHTS_FILE} and "
            f"{EMA_FILE}, or a release, with a config.json"
        )
    return None


def release_tensors(model: nn.Module, name: str | Path, *, has_adapter: bool) -> dict[str, Tensor]:
    """The weights of a release of a model, without those of parts that the model was built without, such as a task head.

    Raises ValueError for a model that is a part of one, and for a release whose tokenizer is another.
    """
    if not isinstance(model, UnifiedModel):
        raise ValueError(f"got init {name}, a release, and a task that trains no whole model")
    if has_adapter:
        raise ValueError(
            f"got init {name}, a release, for a recipe with lora: expected a run of such a recipe, whose adapter to "
            "start from; the release that it stands on is model.from_pretrained"
        )
    released = type(model).from_pretrained(name)
    if tokenizer_files(model) != tokenizer_files(released):
        raise ValueError(f"got init {name}, whose tokenizer is not the recipe's: the rows of its embeddings differ")
    absent = [part for part, _ in released.named_children() if getattr(model, part, None) is None]
    for part in absent:
        logger.info("%s of %s is left out: the recipe's model has none", part, name)
    prefixes = tuple(f"{part}." for part in absent)
    return {key: tensor for key, tensor in named_tensors(released).items() if not key.startswith(prefixes)}


def tokenizer_files(model: nn.Module) -> dict[str, bytes]:
    """The files of the tokenizers of a model and of its parts, by their names and the parts'."""
    files: dict[str, bytes] = {}
    for part, module in model.named_modules():
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            files |= {f"{part}/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}
    return files
