"""Weights in files of torch.save, .bin and .pt, with the methods of an open safetensors file."""

import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from unimm.checkpoint.contents import CheckpointError, describe_unreadable
from unimm.checkpoint.safetensors_file import DTYPE_NAMES, TensorHeader

# what reading a file that is broken, or no torch.save's, raises: bytes that are no pickle may do any of these
_BROKEN_PICKLE = (
    *(UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, RuntimeError, NotImplementedError),
    *(ValueError, OverflowError, TypeError, AttributeError, ImportError, LookupError, AssertionError),
)
# keys under which trainers keep the weights beside their own state
_NESTED_KEYS = ("state_dict", "model", "module", "model_state_dict", "params", "ema", "weights")


@dataclass(frozen=True)
class TorchStateDict:
    """A state dict of torch.save with the methods of an open safetensors file."""

    state: Mapping[str, Tensor]
    taken: set[str] = field(default_factory=set)

    def keys(self) -> list[str]:
        return list(self.state)

    def get_tensor(self, key: str) -> Tensor:
        return self.state[key]

    def is_mappable(self, key: str, *, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether `take_tensor` gives a tensor where it lies: alone in its memory, which is mapped if the file can be."""
        tensor = self.state[key]
        return (
            device.type == "cpu"
            and tensor.dtype == dtype
            and key not in self.taken
            and tensor.is_contiguous()
            and tensor.nbytes == tensor.untyped_storage().nbytes()
            and tensor.data_ptr() % dtype.itemsize == 0
            and self._users[tensor.untyped_storage().data_ptr()] == 1
        )

    @cached_property
    def _users(self) -> Counter[int]:
        """How many tensors have each storage."""
        return Counter(tensor.untyped_storage().data_ptr() for tensor in self.state.values())

    def take_tensor(self, key: str, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor that shares memory with no other."""
        if self.is_mappable(key, dtype=dtype, device=device):
            self.taken.add(key)
            return self.state[key]
        return self.state[key].to(device=device, dtype=dtype, copy=True).contiguous()

    def header(self, key: str) -> TensorHeader:
        tensor = self.state[key]
        name = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        return TensorHeader(tuple(tensor.shape), name)


def open_torch_file(path: Path) -> TorchStateDict:
    """A file of torch.save that holds a state dict, and no code. Raises CheckpointError for anything else."""
    state = load_torch(path, mmap=True)
    _check_state_dict(state, path)
    return TorchStateDict(state)


def load_torch(path: Path, *, mmap: bool = False) -> Any:
    """What torch.save wrote into a file, on the CPU. Raises CheckpointError for a broken file, and for one with code.

    mmap: whether tensors may be read when they are needed, from the file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and _is_stored_zip(path))
    except _BROKEN_PICKLE as error:
        # torch's own message advises to run whatever code the file holds: only its reason is repeated
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        what = describe_unreadable(path) or "expected tensors alone, as torch.save writes them; fetch it again"
        raise CheckpointError(f"cannot read {path}: {reason or type(error).__name__}; {what}") from error


def _is_stored_zip(path: Path) -> bool:
    """Whether the parts of a file lie in it as they are, so that it can be mapped into memory.

    torch.save before 1.6 wrote no zip, and unpacking and zipping again compresses the parts: mapped, their compressed
    bytes would be taken for numbers.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as parts:
        return all(part.compress_type == zipfile.ZIP_STORED for part in parts.infolist())


def _check_state_dict(state: Any, path: Path) -> None:
    """Raise CheckpointError for contents that are no dict of plain tensors by their names, saying what they are."""
    expected = "expected a dict of tensors by their names, as torch.save(model.state_dict(), path) writes it"
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}: {expected}")
    others = {key: value for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)}
    if others:
        nested = [key for key in others if key in _NESTED_KEYS and isinstance(others[key], Mapping)]
        listed = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in list(others.items())[:5])
        advice = f"; load the file, take what {nested[0]!r} holds, and save that alone" if nested else ""
        raise CheckpointError(f"{path} holds {listed}: {expected}{advice}")
    for key, tensor in state.items():
        if odd := _odd_layout(tensor):
            raise CheckpointError(f"{path} holds {key}, which is {odd}: expected a dense tensor with its values")


def _odd_layout(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    return None if tensor.layout == torch.strided else f"sparse ({tensor.layout})"
