"""Blocks whose weights lie in the CPU's memory, and on the device only while they are used.

A module of a block that is about to run makes its block resident; the next block of the same list is copied meanwhile, on a
stream of its own, from pinned memory. All other blocks leave the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

RESIDENT_BLOCKS = 2  # one that runs, and one that is copied


@dataclass(frozen=True)
class Place:
    """Where a weight stands: a name among the parameters, or the buffers, of a module."""

    tensors: dict[str, Any]
    name: str


@dataclass
class StreamedBlock:
    """A block's weights in the CPU's memory, and on the device while it is resident. ready: its copies are made when this
    event, of a CUDA device, has happened."""

    home: list[tuple[Place, Tensor]]
    next_index: int
    copies: list[Tensor] = field(default_factory=list)
    ready: Any = None

    @property
    def n_bytes(self) -> int:
        """What it takes on the device."""
        return sum(tensor.nbytes for _, tensor in self.home)


class BlockStream:
    """Streams the blocks of a model to a device; at most `n_resident` of them are there at a time.

    paths: lists of blocks in the model. What is not below them is moved to the device for good. n_resident: 1 copies
    nothing ahead. Counted are the bytes that are resident, at most so far, and the copies of blocks.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], device: torch.device, *, n_resident: int = RESIDENT_BLOCKS
    ):
        if n_resident < 1:
            raise ValueError(f"got {n_resident} resident blocks: expected at least 1")
        self.device = device
        self.n_resident = n_resident
        self.resident_bytes = 0
        self.peak_bytes = 0
        self.n_copies = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks: list[StreamedBlock] = []
        self._resident: set[int] = set()
        lists = [list(model.get_submodule(path).children()) for path in paths]
        streamed = {id(part) for blocks in lists for block in blocks for part in block.modules()}
        for part in model.modules():
            if id(part) not in streamed:
                _move(part, device)
        for blocks in lists:
            first = len(self._blocks)
            for i, block in enumerate(blocks):
                self._add(block, first + (i + 1) % len(blocks))

    def _add(self, block: nn.Module, next_index: int) -> None:
        index = len(self._blocks)
        home: list[tuple[Place, Tensor]] = []
        for part in block.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        home.append((Place(tensors, name), self._at_home(tensor)))
            part.register_forward_pre_hook(partial(self._before, index))
        self._blocks.append(StreamedBlock(home, next_index))
        for place, tensor in home:
            self._leave(place, tensor)

    def _at_home(self, tensor: Tensor) -> Tensor:
        """A weight in the CPU's memory, pinned where a GPU copies from it: one that is mapped from a file is read."""
        held = tensor.detach().cpu()
        if self._stream is not None:
            held = held.pin_memory()
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(held, requires_grad=tensor.requires_grad) if is_parameter else held

    # ---- use

    def _before(self, index: int, module: nn.Module, args: Any) -> None:
        """Make a block resident before a module of it runs, and begin to copy those after it."""
        wanted = [index]
        while len(wanted) < self.n_resident and self._blocks[wanted[-1]].next_index not in wanted:
            wanted.append(self._blocks[wanted[-1]].next_index)
        for other in self._resident.difference(wanted):
            self._evict(other)
        for one in wanted:
            if one not in self._resident:
                self._copy(one)
        block = self._blocks[index]
        if block.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(block.ready)
            block.ready = None

    @torch.no_grad()
    def _copy(self, index: int) -> None:
        block = self._blocks[index]
        if self._stream is None:
            block.copies = [tensor.detach().to(self.device, copy=True) for _, tensor in block.home]
        else:
            compute = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._stream):
                block.copies = [tensor.detach().to(self.device, non_blocking=True) for _, tensor in block.home]
                block.ready = torch.cuda.Event()
                block.ready.record(self._stream)
            for copied in block.copies:
                copied.record_stream(compute)  # its memory is not given to another copy before this stream is past it
        for (place, _), copied in zip(block.home, block.copies, strict=True):
            place.tensors[place.name] = copied
        self._resident.add(index)
        self.n_copies += 1
        self.resident_bytes += block.n_bytes
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def _evict(self, index: int) -> None:
        block = self._blocks[index]
        for place, tensor in block.home:
            self._leave(place, tensor)
        block.copies = []
        block.ready = None
        self._resident.remove(index)
        self.resident_bytes -= block.n_bytes

    def _leave(self, place: Place, tensor: Tensor) -> None:
        place.tensors[place.name] = tensor

    def bring_home(self) -> None:
        """Let no block be resident: all weights of blocks are the CPU's."""
        for index in list(self._resident):
            self._evict(index)


def _move(part: nn.Module, device: torch.device) -> None:
    """Move a module's own weights to a device, not those of its parts."""
    for name, p in part._parameters.items():
        if p is not None:
            part._parameters[name] = nn.Parameter(p.detach().to(device), requires_grad=p.requires_grad)
    for name, buffer in part._buffers.items():
        if buffer is not None:
            part._buffers[name] = buffer.to(device)
