"""Checkpoints of a run: written beside, renamed into place, read back strictly."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

WEIGHTS_FILE, EMA_FILE, STATE_FILE = "model.safetensors", "average.safetensors", "state.pt"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `folder` only if nothing went wrong inside."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    # a crash between the two renames below leaves the old folder stepped aside
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    # a folder cannot be renamed over a full one: step it aside first
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def save_checkpoint(
    out: Path, step: int, model: nn.Module, *, ema: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Write out/checkpoints/<step>, then drop the older ones."""
    folder = out / "checkpoints" / f"{step:08d}"
    with replacing(folder) as fresh:
        for name, weights in ((WEIGHTS_FILE, named_tensors(model)), (EMA_FILE, ema)):
            save_file({key: x.detach().contiguous().cpu() for key, x in weights.items()}, fresh / name)
        torch.save(dict(state), fresh / STATE_FILE)
    for older in list_checkpoints(out)[:-1]:
        shutil.rmtree(older)
    return folder


def list_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (out / "checkpoints").glob("*") if path.name.isdecimal())


def load_train_state(folder: Path) -> dict[str, Any]:
    """Optimiser, counters and random states of a checkpoint."""
    return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)


def tensor_names(path: Path) -> list[str]:
    """What a safetensors file holds."""
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def load_into(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy a safetensors file into tensors of the same names and shapes."""
    source = load_file(path)
    missing, extra = sorted(targets.keys() - source.keys()), sorted(source.keys() - targets.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit this model: it lacks {missing[:3]} ({len(missing)} in all) and has {extra[:3]} "
            f"({len(extra)} in all) too many: use the recipe that it was trained by"
        )
    for name, target in targets.items():
        if source[name].shape != target.shape:
            raise ValueError(
                f"{name} in {path} is {list(source[name].shape)}, expected {list(target.shape)}: use the recipe that "
                f"it was trained by"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(source[name])


def save_release(folder: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill a folder that then takes the place of the last release."""
    with replacing(folder) as fresh:
        save(fresh)
    logger.info("wrote %s", folder)


class JsonlLog:
    """JSON lines, one object for each stretch of steps."""

    def __init__(self, path: Path, *, after: int) -> None:
        """Keep the lines up to step `after`: a resumed run says the later ones again."""
        self.path = path
        kept = []
        if path.exists() and after:
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= after]
        fresh = path.with_name(path.name + ".new")
        fresh.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        fresh.replace(path)

    def write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
