"""Checkpoints of a run: written beside their place and renamed into it, read back strictly."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from unimm.checkpoint.atomic import atomic_directory, is_interrupted
from unimm.checkpoint.save import own_name, save_safetensors, save_torch

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
EMA_FILE = "average.safetensors"
STATE_FILE = "state.pt"


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those of compiled parts as if they were not; tied ones once."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {own_name(name): tensor for name, tensor in tensors.items()}


def save_checkpoint(
    out: Path, step: int, model: nn.Module, *, ema: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Write out/checkpoints/<step>, then delete the others. Raises OSError, which names the file, and deletes none."""
    folder = out / "checkpoints" / f"{step:08d}"
    with atomic_directory(folder, replace=True) as partial:
        for name, weights in ((WEIGHTS_FILE, named_tensors(model)), (EMA_FILE, ema)):
            save_safetensors(weights, partial / name)
        save_torch(state, partial / STATE_FILE)
    for other in _checkpoint_folders(out):
        if other != folder:
            shutil.rmtree(other)
    return folder


def list_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [path for path in _checkpoint_folders(out) if _is_complete(path)]


def _checkpoint_folders(out: Path) -> list[Path]:
    return sorted(path for path in (out / "checkpoints").glob("*") if path.name.isdecimal())


def _is_complete(folder: Path) -> bool:
    """Whether the files of a checkpoint have all been moved into it: before that it is empty, or marked."""
    return not is_interrupted(folder) and any(not path.name.startswith(".") for path in folder.iterdir())


def load_train_state(folder: Path) -> dict[str, Any]:
    """Optimisers, counters and random states of a checkpoint."""
    return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def load_into(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy a safetensors file into tensors of the same names and shapes.

    Raises ValueError, and changes nothing, where a name or a shape differs.
    """
    source = load_file(path)
    missing = sorted(targets.keys() - source.keys())
    extra = sorted(source.keys() - targets.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit this model: it lacks {missing[:3]} ({len(missing)} in all) and has {extra[:3]} "
            f"({len(extra)} in all) too many: use the recipe that it was trained by, and the version of unimm, since "
            "checkpoints of a run hold our names of parameters (releases keep theirs)"
        )
    for name, target in targets.items():
        if source[name].shape != target.shape:
            raise ValueError(
                f"{name} in {path} is {list(source[name].shape)}, expected {list(target.shape)}: use the recipe that "
                "it was trained by"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(source[name])


def save_release(folder: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill a folder that then takes the place of the last release."""
    with atomic_directory(folder, replace=True) as partial:
        save(partial)
    logger.info("wrote %s", folder)
