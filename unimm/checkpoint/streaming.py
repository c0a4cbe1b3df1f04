"""Tensors of a file on their way into memory: mapped where they can stay as they are, else read and converted by
threads that work ahead, piece by piece, so that nothing but the results and a few small buffers is held.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unimm.checkpoint.safetensors_file import SafetensorsFile, StoredTensor

# smaller tensors are copied: that costs nothing, and aligns them as PyTorch aligns its own
MIN_MAPPED_BYTES = 2**18
READ_AHEAD_BYTES = 2**28  # of results that nobody has taken yet
PIECE_BYTES = 2**24  # of a file, for one thread at a time
BUFFER_BYTES = 2**20  # of a thread; small enough to stay in a processor's cache
# PyTorch splits operations on more elements among threads of its own, which would only wait for each other here
SERIAL_ELEMENTS = 2**15
MAX_THREADS = 4


@dataclass(frozen=True)
class Request:
    """A tensor that is wanted. target: where its values go, in any dtype; a tensor of its own unless given. may_map:
    whether it may stay in the file."""

    key: str
    target: Tensor | None = None
    may_map: bool = True


@dataclass
class _Arriving:
    """A tensor that is on its way. pieces: of which each tells whether it holds NaN. has_nan: None for not looked at."""

    key: str
    tensor: Tensor
    pieces: list[Future[bool]] = field(default_factory=list)
    n_bytes: int = 0
    has_nan: bool | None = None


def is_mappable(stored: StoredTensor, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a tensor can stay where it lies in the file."""
    return device.type == "cpu" and stored.dtype == dtype and stored.is_aligned and stored.n_bytes >= MIN_MAPPED_BYTES


def read_tensors_ahead(
    file: SafetensorsFile, requests: Iterable[Request], *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, bool | None]]:
    """The name of each tensor, in order, its values in `dtype` on `device`, and whether these hold NaN.

    Those without a target that can be mapped are, and None stands for what nobody has looked at. Raises CheckpointError
    where the file is cut short meanwhile.
    """
    reader = _PieceReader(file, device)
    arriving: deque[_Arriving] = deque()
    n_ahead = 0
    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="unimm-loading")
    try:
        for request in requests:
            stored = file.tensors[request.key]
            is_mapped = request.target is None and request.may_map
            if is_mapped and is_mappable(stored, dtype=dtype, device=device):
                one = _Arriving(request.key, file.get_tensor(request.key))
            else:
                target = (
                    torch.empty(stored.shape, dtype=dtype, device=device) if request.target is None else request.target
                )
                one = _Arriving(request.key, target, n_bytes=target.nbytes)
                if stored.n_bytes < MIN_MAPPED_BYTES:  # which is done before a thread would have begun
                    one.has_nan = reader.read(stored, target, 0, target.numel())
                else:
                    one.pieces = [pool.submit(reader.read, stored, target, *piece) for piece in _pieces(stored)]
            arriving.append(one)
            n_ahead += one.n_bytes
            while arriving and (not arriving[0].pieces or n_ahead > READ_AHEAD_BYTES):
                n_ahead -= arriving[0].n_bytes
                yield _arrived(arriving.popleft())
        while arriving:
            yield _arrived(arriving.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _arrived(one: _Arriving) -> tuple[str, Tensor, bool | None]:
    found = [piece.result() for piece in one.pieces]  # waits for each
    return one.key, one.tensor, any(found) if found else one.has_nan


def _pieces(stored: StoredTensor) -> list[tuple[int, int]]:
    """The first element and the one after the last of each piece of a tensor."""
    total = math.prod(stored.shape)
    step = PIECE_BYTES // stored.dtype.itemsize
    return [(first, min(first + step, total)) for first in range(0, total, step)]


class _PieceReader(threading.local):
    """Reads pieces of tensors; each thread has a buffer of its own."""

    def __init__(self, file: SafetensorsFile, device: torch.device):
        self.file = file
        # a GPU takes its copies from memory that is pinned, and larger ones faster
        is_cuda = device.type == "cuda"
        n_bytes = PIECE_BYTES if is_cuda else BUFFER_BYTES
        self.buffer = torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=is_cuda)

    @torch.inference_mode()  # whatever mode the caller, and so the target, is in
    def read(self, stored: StoredTensor, target: Tensor, first: int, end: int) -> bool:
        """Read the elements from `first` up to `end` of a tensor into the same ones of `target`; whether one is NaN."""
        flat = target.view(-1)
        step = len(self.buffer) // stored.dtype.itemsize
        checks: list[Tensor] = []
        for begin in range(first, end, step):
            n = min(step, end - begin)
            raw = self.buffer[: n * stored.dtype.itemsize]
            self.file.read_into(raw.numpy().data, stored.start + begin * stored.dtype.itemsize)
            checks += _convert(raw.view(stored.dtype), flat[begin : begin + n])
        return bool(torch.stack(checks).isnan().any()) if checks else False


def _convert(source: Tensor, target: Tensor) -> list[Tensor]:
    """Copy values into a tensor of any dtype and device; smallest numbers of them, one of which is NaN where one is."""
    if not target.is_cpu:
        target.copy_(source.to(target.device))
        return _minima(target)
    checks = []
    checked = source if source.dtype == torch.float32 else target  # its smallest number is found fastest
    for start in range(0, len(source), SERIAL_ELEMENTS):
        part = slice(start, start + SERIAL_ELEMENTS)
        target[part].copy_(source[part])
        checks += _minima(checked[part])
    return checks


def _minima(x: Tensor) -> list[Tensor]:
    # one pass, and no copy: the smallest number of a tensor with NaN is NaN
    return [x.amin().float()] if x.is_floating_point() and x.dtype.itemsize > 1 and len(x) else []
