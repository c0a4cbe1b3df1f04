"""A model's parameters filled from open files of weights: mapped, or read and converted."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from unimm.checkpoint.keymap import Slice, Transform
from unimm.checkpoint.safetensors_file import SafetensorsFile
from unimm.checkpoint.streaming import Request, empty, is_mappable, read_tensors_ahead
from unimm.checkpoint.torch_file import TorchStateDict

OpenWeights = SafetensorsFile | TorchStateDict
MAX_CHECKED_BYTES = 2**30  # mapped weights beyond this are not searched for NaN, which would read them all

_stay_in_files: ContextVar[bool] = ContextVar("unimm_weights_stay_in_files", default=False)


@contextmanager
def weights_stay_in_files(stay: bool) -> Iterator[None]:
    """Leave the weights that the body loads in their files, mapped, if `stay`: no memory of their own is asked for."""
    token = _stay_in_files.set(stay)
    try:
        yield
    finally:
        _stay_in_files.reset(token)


def weights_stay() -> bool:
    """Whether weights are to stay in their files."""
    return _stay_in_files.get()


class ModelFiller:
    """Puts the tensors of files into a model's parameters. found: the transform of each released tensor."""

    def __init__(self, model: nn.Module, found: Mapping[str, Transform], dtype: torch.dtype, device: torch.device):
        self.model = model
        self.found = found
        self.dtype = dtype
        self.device = device
        self.with_nan: list[str] = []
        self._wholes: dict[str, Tensor] = {}  # parameters that several tensors fill, by our names
        self._checked_bytes = 0  # of mapped tensors that were searched for NaN

    def needed_bytes(self, file: OpenWeights, keys: Sequence[str], skip: int) -> int:
        """The memory that tensors of a file will take, but for those that are mapped. skip: the length of a prefix."""
        return sum(
            math.prod(file.header(key).shape) * self.dtype.itemsize for key in keys if not self._maps(file, key, skip)
        )

    def _maps(self, file: OpenWeights, key: str, skip: int) -> bool:
        if isinstance(self.found[key[skip:]], Slice):  # other tensors fill the rest of the same memory
            return False
        if isinstance(file, TorchStateDict):
            return file.is_mappable(key, dtype=self.dtype, device=self.device)
        return is_mappable(file.tensors[key], dtype=self.dtype, device=self.device)

    def load(self, file: OpenWeights, keys: Sequence[str], skip: int) -> Iterator[str]:
        """Load tensors of a file; the names of those that have been loaded."""
        for key, released, has_nan in self._read(file, keys, skip):
            self._assign(self.found[key[skip:]], released)
            if has_nan or (has_nan is None and self._finds_nan(released)):
                self.with_nan.append(key)
            yield key

    def _read(self, file: OpenWeights, keys: Sequence[str], skip: int) -> Iterator[tuple[str, Tensor, bool | None]]:
        requests = (Request(key, self._target(self.found[key[skip:]])) for key in keys)
        if isinstance(file, SafetensorsFile):
            file.read_only_fallback = weights_stay()
            yield from read_tensors_ahead(file, requests, dtype=self.dtype, device=self.device)
            return
        for request in requests:
            if request.target is None:
                released = file.take_tensor(request.key, dtype=self.dtype, device=self.device)
            else:
                released = request.target.copy_(file.get_tensor(request.key))
            yield request.key, released, None

    def _target(self, transform: Transform) -> Tensor | None:
        """The memory of a tensor that is a part of a parameter."""
        if not isinstance(transform, Slice):
            return None
        if transform.ours not in self._wholes:
            shape = get_tensor(self.model, transform.ours).shape
            self._wholes[transform.ours] = empty(shape, dtype=self.dtype, device=self.device)
        return transform.rows_of(self._wholes[transform.ours])

    def _assign(self, transform: Transform, released: Tensor) -> None:
        if isinstance(transform, Slice):
            set_tensor(self.model, transform.ours, self._wholes[transform.ours])
            return
        ours = [get_tensor(self.model, name) for name in transform.our_names]
        for name, tensor in zip(transform.our_names, transform.to_ours(released, ours), strict=True):
            set_tensor(self.model, name, _with_own_storage(tensor))

    def _finds_nan(self, tensor: Tensor) -> bool:
        self._checked_bytes += MAX_CHECKED_BYTES if weights_stay() else tensor.nbytes
        return self._checked_bytes <= MAX_CHECKED_BYTES and _has_nan(tensor)


def _with_own_storage(tensor: Tensor) -> Tensor:
    """A tensor whose storage holds nothing else: copies and pickles of one that is a part would hold the whole."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == tensor.nbytes or not tensor.nbytes:
        return tensor
    if not tensor.is_cpu or not tensor.is_contiguous():
        return tensor.clone(memory_format=torch.contiguous_format)
    start = tensor.storage_offset() * tensor.element_size()
    own: Any = storage[start : start + tensor.nbytes]  # the same memory
    return torch.empty(0, dtype=tensor.dtype).set_(own).view(tensor.shape)


def _has_nan(tensor: Tensor) -> bool:
    # the smallest number of a tensor with NaN is NaN: one pass, and no copy
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return False
    return bool(tensor.amin().isnan())


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter, or the buffer, of that name, without its gradient."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf).detach()


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter, or the buffer, of that name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor
