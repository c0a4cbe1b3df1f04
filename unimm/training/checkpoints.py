"""Checkpoints of a run: written beside their place and renamed into it, read back strictly; the last two are kept."""

from __future__ import annotations

import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unimm.checkpoint.atomic import atomic_directory, is_interrupted
from unimm.checkpoint.contents import CheckpointError, describe_unreadable
from unimm.checkpoint.json_files import read_json, write_json
from unimm.checkpoint.load import open_weights
from unimm.checkpoint.save import own_name, save_safetensors, save_torch
from unimm.checkpoint.torch_file import load_torch
from unimm.models.adapted import AdaptedModel

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
EMA_FILE = "average.safetensors"
STATE_FILE = "state.pt"
# the checksums of the others, by their names; earlier checkpoints have none
CHECKSUMS_FILE = "checksums.json"
# the newest, and the one before, in case that the newest is damaged
N_KEPT = 2
STATE_KEYS = ("step", "updates", "optimizers", "sums", "rng", "recipe")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those of compiled parts as if they were not; tied ones once.

    Where an adapter is trained, its own alone: the rest is the release's that it stands on.
    """
    if isinstance(model, AdaptedModel) and model.adapters is not None and model.adapters.names:
        return {own_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {own_name(name): tensor for name, tensor in tensors.items()}


def save_checkpoint(
    out: Path, step: int, model: nn.Module, *, ema: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Write out/checkpoints/<step>, then delete all but the last two. Raises OSError, which names the file, and deletes
    none."""
    folder = out / "checkpoints" / f"{step:08d}"
    with atomic_directory(folder, replace=True) as partial:
        for name, weights in ((WEIGHTS_FILE, named_tensors(model)), (EMA_FILE, ema)):
            save_safetensors(weights, partial / name)
        save_torch(state, partial / STATE_FILE)
        checksums = {name: _checksum(partial / name) for name in (WEIGHTS_FILE, EMA_FILE, STATE_FILE)}
        write_json(partial / CHECKSUMS_FILE, checksums)
    kept = list_checkpoints(out)[-N_KEPT:]
    for other in _checkpoint_folders(out):
        if other not in kept:
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
    path = folder / STATE_FILE
    if what := describe_unreadable(path):
        raise CheckpointError(f"cannot read {path}: {what}")
    state = load_torch(path)
    missing = [name for name in STATE_KEYS if name not in state] if isinstance(state, dict) else STATE_KEYS
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: expected the state of a run")
    return state


def check_undamaged(folder: Path) -> None:
    """Raise CheckpointError where a checkpoint's files are not those that were written."""
    if not (folder / CHECKSUMS_FILE).exists():
        return
    try:
        checksums = read_json(folder / CHECKSUMS_FILE)
    except ValueError as error:
        raise CheckpointError(f"cannot read {folder / CHECKSUMS_FILE}: {error}") from error
    for name, checksum in checksums.items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            raise CheckpointError(f"{folder / name} does not hold what was written: its checksum is another")


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return checksum


@contextmanager
def offer_earlier(checkpoints: Sequence[Path], how: str) -> Iterator[None]:
    """Add to a CheckpointError of the body, which reads the last of these, how to go on from the one before."""
    try:
        yield
    except CheckpointError as error:
        *_, damaged = checkpoints
        before = checkpoints[-2] if len(checkpoints) > 1 else None
        advice = how.format(damaged=damaged, before=before) if before else "there is none before it: start another run"
        raise CheckpointError(f"{error}; this checkpoint is damaged: {advice}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file. Raises CheckpointError, which names it, for a broken one."""
    with open_weights(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with open_weights(path) as file:
        return list(file.keys())


def load_into(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy a safetensors file into tensors of the same names and shapes.

    Raises ValueError, and changes nothing, where a name or a shape differs.
    """
    copy_into(targets, read_tensors(path), str(path))


def copy_into(targets: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into those of the same names and shapes. where: what holds the source, for the error.

    Raises ValueError, and changes nothing, where a name or a shape differs.
    """
    missing = sorted(targets.keys() - source.keys())
    extra = sorted(source.keys() - targets.keys())
    if missing or extra:
        raise ValueError(
            f"{where} does not fit this model: it lacks {missing[:3]} ({len(missing)} in all) and has {extra[:3]} "
            f"({len(extra)} in all) too many: use the recipe that it was trained by, and the version of unimm, since "
            "checkpoints of a run hold our names of parameters (releases keep theirs)"
        )
    for name, target in targets.items():
        if source[name].shape != target.shape:
            raise ValueError(
                f"{name} in {where} is {list(source[name].shape)}, expected {list(target.shape)}: use the recipe that "
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
