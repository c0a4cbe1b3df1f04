"""Safetensors files: headers checked strictly, and tensors that are mapped from the file or read into memory.

The format: https://github.com/huggingface/safetensors. Eight bytes are the length of a JSON header, little endian; it
gives each tensor's dtype, shape and place among the bytes behind it, which the tensors fill without gaps.
"""

import errno
import json
import math
import mmap
import os
import stat
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimm.checkpoint.contents import CheckpointError, describe_unreadable

# the format's names of dtypes
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # as the format's own library has it
MAP_NORESERVE = 0x4000  # Linux; Python has it from 3.13 on


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StoredTensor:
    """Where in a file a tensor's bytes lie. start: from the beginning of the file."""

    shape: tuple[int, ...]
    dtype_name: str
    start: int
    n_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def is_aligned(self) -> bool:
        """Whether its bytes lie in the file as they must in memory."""
        return self.start % self.dtype.itemsize == 0


class SafetensorsFile:
    """An open file. Raises CheckpointError, which names the file and the tensor, for a header that is not right."""

    def __init__(self, path: Path):
        self.path = path
        handle = _open_regular(path)
        weakref.finalize(self, os.close, handle)
        self._handle = handle
        self._size = os.fstat(handle).st_size
        self.tensors = _read_header(handle, self._size, path)
        # whether a file that may not be mapped to be written to is mapped to be read alone
        self.read_only_fallback = False
        self._mapping: mmap.mmap | None = None
        self._mapped: set[str] = set()

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self.tensors)

    def header(self, key: str) -> TensorHeader:
        """Shape and dtype of a tensor."""
        return TensorHeader(self.tensors[key].shape, self.tensors[key].dtype_name)

    def get_tensor(self, key: str) -> Tensor:
        """A tensor in memory that is mapped from the file: read when it is used, copied when it is written to.

        It shares memory with no other tensor, and the file keeps its contents whatever is done to it. One whose bytes
        are not aligned is read at once. The file may be replaced or deleted meanwhile, but not cut or overwritten.
        """
        stored = self.tensors[key]
        if not stored.n_bytes:
            return torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        if not stored.is_aligned:
            target = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
            self.read_into(target.view(-1).view(torch.uint8).numpy().data, stored.start)
            return target
        if self._mapping is None or key in self._mapped:  # a second tensor of the same bytes gets pages of its own
            self._mapping = self._map()
            self._mapped.clear()
        self._mapped.add(key)
        count = math.prod(stored.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # see _map
            flat = torch.frombuffer(self._mapping, dtype=stored.dtype, count=count, offset=stored.start)
        return flat.view(stored.shape)

    def _map(self) -> mmap.mmap:
        """The whole file, mapped. Raises MemoryError where this process may not have as much."""
        try:
            # no memory is reserved for pages that may come to be written: a file larger than all memory is mapped, too
            return mmap.mmap(
                self._handle,
                self._size,
                flags=mmap.MAP_PRIVATE | MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            # a limit on data (ulimit -d) counts what could be written, and no more than that
            if self.read_only_fallback:
                return mmap.mmap(self._handle, self._size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            raise MemoryError(
                f"cannot map {self.path}, {self._size / 2**30:.1f} GiB, within this process's limit on memory: raise it "
                '(ulimit -d, ulimit -v), or load with offload="disk", whose weights cannot be written to then'
            ) from error

    def read_into(self, target: memoryview, start: int) -> None:
        """Fill memory with the file's bytes from `start` on. Raises CheckpointError where the file was cut meanwhile."""
        done = 0
        while done < len(target):
            n = os.preadv(self._handle, [target[done:]], start + done)
            if not n:
                raise CheckpointError(f"cannot read {self.path}: it was cut short while it was read; fetch it again")
            done += n


def _open_regular(path: Path) -> int:
    if not stat.S_ISREG(path.stat().st_mode):  # to open another kind may never end
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return os.open(path, os.O_RDONLY)


def _read_header(handle: int, size: int, path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, in the order in which they lie in it."""
    if size < LENGTH_BYTES:
        raise _broken(path, f"it has {size} bytes, cut short before its header")
    length = int.from_bytes(os.pread(handle, LENGTH_BYTES, 0), "little")
    first = LENGTH_BYTES + length
    if first > size:
        raise _broken(path, f"its header has {length} bytes and the file {size}: it is cut short or no safetensors")
    if length > MAX_HEADER_BYTES:
        raise _broken(path, f"its header has {length} bytes, expected at most {MAX_HEADER_BYTES}")
    try:
        header = json.loads(os.pread(handle, length, LENGTH_BYTES).decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, f"its header holds {header!r:.40}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, f"__metadata__ holds {metadata!r:.80}, expected texts by their names")
    tensors = {key: _stored_tensor(key, entry, first, path) for key, entry in header.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].n_bytes))
    _check_no_gaps(ordered, first, size, path)
    return dict(ordered)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has {next(key for key in keys if keys.count(key) > 1)!r:.80} twice")
    return found


def _stored_tensor(key: str, entry: Any, first: int, path: Path) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"{key:.200} has {entry!r:.80}, expected dtype, shape and data_offsets")
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(path, f"{key:.200} has dtype {dtype!r:.80}, expected one of {', '.join(DTYPES)}")
    if not _are_counts(shape):
        raise _broken(path, f"{key:.200} has shape {shape!r:.80}, expected whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _broken(path, f"{key:.200} has data_offsets {offsets!r:.80}, expected two whole numbers")
    begin, end = offsets
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != n_bytes:
        raise _broken(
            path, f"{key:.200} has {end - begin} bytes, expected {n_bytes} for shape {shape!r:.80} in {dtype}"
        )
    return StoredTensor(tuple(shape), dtype, first + begin, n_bytes)


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _check_no_gaps(ordered: list[tuple[str, StoredTensor]], first: int, size: int, path: Path) -> None:
    """Raise CheckpointError unless tensors, in the order of their places, fill a file from its header to its end."""
    end = first
    for key, stored in ordered:
        if stored.start != end:
            what = "overlaps the tensor before it" if stored.start < end else "begins after a gap"
            raise _broken(path, f"{key:.200} {what}: it lies at byte {stored.start - first}, expected {end - first}")
        end += stored.n_bytes
        if end > size:
            raise _broken(path, f"{key:.200} ends at byte {end} and the file at {size}: it is cut short")
    if end != size:
        raise _broken(path, f"its tensors end at byte {end} and the file at {size}")


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"cannot read {path}: {reason}; {describe_unreadable(path) or 'fetch it again'}")
