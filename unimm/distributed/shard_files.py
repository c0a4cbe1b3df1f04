"""Files of shards, written by all ranks at once and read by any number of them: safetensors of
torch.distributed.checkpoint, which hold no pickles."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from unimm.distributed.ranks import Ranks


def save_shards(folder: Path, tensors: Mapping[str, Tensor], *, group: dist.ProcessGroup | None = None) -> None:
    """Write this rank's shards of some tensors into a folder that all ranks see; what all hold is written once.

    group: of the ranks, unless it is the common one. Raises OSError on every rank where one cannot write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise _as_os_error(error, folder) from error


def _as_os_error(error: CheckpointException, folder: Path) -> Exception:
    """The error that the first rank met, or the whole where that is none of the disk's."""
    for rank, (cause, _) in sorted(error.failures.items()):
        if isinstance(cause, OSError) and cause.errno is not None:
            return OSError(cause.errno, f"{cause.strerror} (process {rank})", str(cause.filename or folder))
    return RuntimeError(str(error))


def load_shards(folder: Path, targets: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Read tensors in place: each rank its own shards, in however many the files hold them."""
    with warnings.catch_warnings():
        # torch says that it reads in one process where it was asked to
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        load(dict(targets), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=ranks.size == 1)


def shard_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole tensors in a folder of shards, by name."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tuple(one.size) for name, one in metadata.items() if isinstance(one, TensorStorageMetadata)}
