"""Checkpoints of a run: written beside their place and renamed into it, read back strictly; the last two are kept.

What each rank holds whole is written by the first rank, a file a kind; what lies in shards by all ranks. Both are read
by any number of ranks.
"""

from __future__ import annotations

import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from unimm.distributed.ranks import Ranks
from unimm.distributed.shard_files import load_shards, save_shards, shard_shapes
from unimm.distributed.sharding import local_tensor, shard_like
from unimm.models.adapted import AdaptedModel

logger = logging.getLogger(__name__)

# the weights, their averages, and what the optimisers hold of them, by kind; of a kind NAME.safetensors, or, in shards,
# tensors that are called NAME/...
WEIGHTS = "model"
EMA_WEIGHTS = "average"
OPTIMIZER = "optimizer"
WEIGHTS_FILE = f"{WEIGHTS}.safetensors"
EMA_FILE = f"{EMA_WEIGHTS}.safetensors"
SHARDS_FOLDER = "shards"
STATE_FILE = "state.pt"
# the checksums of the others, by their names; earlier checkpoints have none
CHECKSUMS_FILE = "checksums.json"
# the newest, and the one before, in case that the newest is damaged
N_KEPT = 2
STATE_KEYS = ("step", "updates", "sums", "rng", "recipe")
# of a checkpoint, by kind and name
Tensors = Mapping[str, Mapping[str, Tensor]]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those of compiled parts as if they were not; tied ones once.

    Where an adapter is trained, its own alone: the rest is the release's that it stands on.
    """
    if isinstance(model, AdaptedModel) and model.adapters is not None and model.adapters.names:
        return {own_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {own_name(name): tensor for name, tensor in tensors.items()}


# ---- writing


def save_checkpoint(
    out: Path, step: int, tensors: Tensors, *, state: Mapping[str, Any], ranks: Ranks, sharded: bool
) -> Path:
    """Write out/checkpoints/<step>, then delete all but the last two: together with all ranks, which see the folder.

    Raises OSError, which names the file, on every rank, and deletes none.
    """
    folder = out / "checkpoints" / f"{step:08d}"
    with ExitStack() as stack:
        partial = ranks.run_first(lambda: stack.enter_context(atomic_directory(folder, replace=True)))
        if sharded:
            flat = {f"{kind}/{name}": x for kind, some in tensors.items() for name, x in some.items()}
            save_shards(partial / SHARDS_FOLDER, flat, group=ranks.group)
        else:
            ranks.run_first(lambda: _write_whole(partial, tensors))
        checksums = _checksums(partial, ranks)
        ranks.run_first(lambda: _write_state(partial, state, checksums))
        ranks.run_first(stack.close)
    ranks.run_first(lambda: _delete_old(out))
    return folder


def _write_whole(folder: Path, tensors: Tensors) -> None:
    for kind, weights in tensors.items():
        save_safetensors(weights, folder / f"{kind}.safetensors")


def _write_state(folder: Path, state: Mapping[str, Any], checksums: Mapping[str, int]) -> None:
    save_torch(state, folder / STATE_FILE)
    write_json(folder / CHECKSUMS_FILE, {**checksums, STATE_FILE: _checksum(folder / STATE_FILE)})


def _checksums(folder: Path, ranks: Ranks) -> dict[str, int]:
    """The checksums of all files of a folder, each rank's of a share of them: of shards, of those that it wrote."""
    files = sorted(folder.rglob("*.safetensors"))[ranks.rank :: ranks.size]
    ours = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
    return {name: checksum for one in ranks.gather(ours) for name, checksum in one.items()}


def _delete_old(out: Path) -> None:
    kept = list_checkpoints(out)[-N_KEPT:]
    for other in _checkpoint_folders(out):
        if other not in kept:
            shutil.rmtree(other)


def save_release(folder: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill a folder that then takes the place of the last release."""
    with atomic_directory(folder, replace=True) as partial:
        save(partial)
    logger.info("wrote %s", folder)


# ---- finding


def list_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [path for path in _checkpoint_folders(out) if _is_complete(path)]


def _checkpoint_folders(out: Path) -> list[Path]:
    return sorted(path for path in (out / "checkpoints").glob("*") if path.name.isdecimal())


def _is_complete(folder: Path) -> bool:
    """Whether the files of a checkpoint have all been moved into it: before that it is empty, or marked."""
    return not is_interrupted(folder) and any(not path.name.startswith(".") for path in folder.iterdir())


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds the weights of a checkpoint and their averages."""
    return (folder / SHARDS_FOLDER).is_dir() or all((folder / name).is_file() for name in (WEIGHTS_FILE, EMA_FILE))


# ---- reading


def load_train_state(folder: Path) -> dict[str, Any]:
    """Counters and random states of a checkpoint."""
    path = folder / STATE_FILE
    if what := describe_unreadable(path):
        raise CheckpointError(f"cannot read {path}: {what}")
    state = load_torch(path)
    missing = [name for name in STATE_KEYS if name not in state] if isinstance(state, dict) else STATE_KEYS
    if "optimizers" in state:
        raise ValueError(
            f"{path} was written by an earlier version of unimm: go on with that, or start from its weights by init"
        )
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: expected the state of a run")
    return state


def check_undamaged(folder: Path, ranks: Ranks | None = None) -> None:
    """Raise CheckpointError, on every rank, where a checkpoint's files are not those that were written."""
    ranks = ranks or Ranks()
    if not (folder / CHECKSUMS_FILE).exists():
        return
    try:
        checksums = read_json(folder / CHECKSUMS_FILE)
    except ValueError as error:
        raise CheckpointError(f"cannot read {folder / CHECKSUMS_FILE}: {error}") from error
    # a name may be damaged, too, and lead elsewhere
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    ours = sorted(checksums)[ranks.rank :: ranks.size]
    wrong = [name for name in ours if name not in files or _checksum(files[name]) != checksums[name]]
    for name in (name for names in ranks.gather(wrong) for name in names):
        raise CheckpointError(f"{folder}/{name} does not hold what was written: its checksum is another")


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


def saved_shapes(folder: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors of a kind, by name."""
    if (folder / SHARDS_FOLDER).is_dir():
        shapes = shard_shapes(folder / SHARDS_FOLDER)
        return {name.removeprefix(f"{kind}/"): x for name, x in shapes.items() if name.startswith(f"{kind}/")}
    with open_weights(folder / f"{kind}.safetensors") as file:
        return {name: file.header(name).shape for name in file.keys()}


def load_into(folder: Path, kind: str, targets: Mapping[str, Tensor], ranks: Ranks | None = None) -> None:
    """Copy a checkpoint's tensors of a kind into tensors of the same names and shapes, whole ones or shards.

    Raises ValueError, and changes nothing, where a name or a shape differs.
    """
    check_shapes(targets, saved_shapes(folder, kind), f"{kind} of {folder}")
    if (folder / SHARDS_FOLDER).is_dir():
        prefixed = {f"{kind}/{name}": x.detach() for name, x in targets.items()}
        load_shards(folder / SHARDS_FOLDER, prefixed, ranks or Ranks())
    else:
        copy_into(targets, read_tensors(folder / f"{kind}.safetensors"), f"{kind} of {folder}")


def copy_into(targets: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str) -> None:
    """Copy whole tensors into those of the same names and shapes. where: what holds the source, for the error.

    Raises ValueError, and changes nothing, where a name or a shape differs.
    """
    check_shapes(targets, {name: tuple(x.shape) for name, x in source.items()}, where)
    with torch.no_grad():
        for name, target in targets.items():
            local_tensor(target.detach()).copy_(shard_like(source[name].to(target.dtype), target))


def check_shapes(targets: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ValueError where names or shapes differ from those of the targets. where: what has the shapes."""
    missing = sorted(targets.keys() - shapes.keys())
    extra = sorted(shapes.keys() - targets.keys())
    if missing or extra:
        raise ValueError(
            f"{where} does not fit this model: it lacks {missing[:3]} ({len(missing)} in all) and has {extra[:3]} "
            f"({len(extra)} in all) too many: use the recipe that it was trained by, and the version of unimm, since "
            "checkpoints of a run hold our names of parameters (releases keep theirs)"
        )
    for name, target in targets.items():
        if shapes[name] != tuple(target.shape):
            raise ValueError(
                f"{name} in {where} is {list(shapes[name])}, expected {list(target.shape)}: use the recipe that it was "
                "trained by"
            )
