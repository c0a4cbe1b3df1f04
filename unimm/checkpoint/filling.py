"""A model's parameters filled from open files of weights: mapped, or read and converted."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unimm.checkpoint.keymap import Concat, Rename, Slice, SwapHalves, Transform
from unimm.checkpoint.quantized_tensors import QuantizedTensor
from unimm.checkpoint.safetensors_file import SafetensorsFile
from unimm.checkpoint.streaming import Request, is_mappable, read_tensors_ahead
from unimm.checkpoint.torch_file import TorchStateDict
from unimm.kernels.weight_formats import StoredRows, WeightFormat

OpenWeights = SafetensorsFile | TorchStateDict
MAX_CHECKED_BYTES = 2**28  # mapped weights beyond this are not searched for NaN, which would read them all

MOVES_ROWS = (Rename, SwapHalves, Slice, Concat)  # transforms that leave each row as it is

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


@dataclass(frozen=True)
class LoadQuantization:
    """Linears that are quantized while they are loaded, one at a time.

    parts: modules below which every linear is, that `format` has groups for. make: from a linear, whose bias may not be
    loaded yet, and its rounded weights, what stands in its place; a bias is loaded into its parameter `bias`.
    """

    format: WeightFormat
    parts: tuple[str, ...]
    make: Callable[[nn.Linear, WeightFormat, StoredRows], nn.Module]

    def covers(self, model: nn.Module, name: str) -> bool:
        """Whether a parameter is the matrix of such a linear."""
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight" or not any(owner.startswith(f"{part}.") for part in self.parts):
            return False
        linear = model.get_submodule(owner)
        return type(linear) is nn.Linear and self.format.fits(linear.in_features)

    def put(self, model: nn.Module, name: str, stored: StoredRows) -> None:
        """Put the linear with these weights into its place."""
        owner = name.rpartition(".")[0]
        linear = model.get_submodule(owner)
        assert isinstance(linear, nn.Linear), "as `covers` says"
        model.set_submodule(owner, self.make(linear, self.format, stored))


class ModelFiller:
    """Puts the tensors of files into a model's parameters. found: the transform of each released tensor. quantized:
    those that are in few bits."""

    def __init__(
        self,
        model: nn.Module,
        found: Mapping[str, Transform],
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantization: LoadQuantization | None = None,
        quantized: Mapping[str, QuantizedTensor] | None = None,
    ):
        self.quantization = quantization
        self.quantized = quantized or {}
        self.model = model
        self.found = found
        self.dtype = dtype
        self.device = device
        self.with_nan: list[str] = []
        self._wholes: dict[str, Tensor] = {}  # parameters that several tensors fill, by our names
        self._stored_wholes: dict[str, StoredRows] = {}  # the same of those that come in few bits and stay so
        self._n_shares: dict[str, int] = {}  # of those, that have been filled
        self._checked_bytes = 0  # of mapped tensors that were searched for NaN

    def needed_bytes(self, file: OpenWeights, keys: Sequence[str], skip: int) -> int:
        """The memory that tensors of a file will take, but for those that are mapped. skip: the length of a prefix."""
        needed = 0.0
        for key in keys:
            if not self._maps(file, key, skip):
                width: float = self.dtype.itemsize
                if self.quantization is not None and self._is_quantized(self.found[key[skip:]]):
                    width = self.quantization.format.BYTES_PER_WEIGHT
                needed += math.prod(file.header(key).shape) * width
        return int(needed)

    def _is_quantized(self, transform: Transform) -> bool:
        return self.quantization is not None and any(
            self.quantization.covers(self.model, name) for name in transform.our_names
        )

    def _maps(self, file: OpenWeights, key: str, skip: int) -> bool:
        transform = self.found[key[skip:]]
        # other tensors fill the rest of the same memory, or it is given back at once
        if isinstance(transform, Slice) or self._is_quantized(transform):
            return False
        if isinstance(file, TorchStateDict):
            return file.is_mappable(key, dtype=self.dtype, device=self.device)
        return is_mappable(file.tensors[key], dtype=self.dtype, device=self.device)

    def load(self, file: OpenWeights, keys: Sequence[str], skip: int) -> Iterator[str]:
        """Load tensors of a file; the names of those that have been loaded."""
        whole = [key for key in keys if key[skip:] not in self.quantized]
        for key, released, has_nan in self._read(file, whole, skip):
            self._assign(self.found[key[skip:]], released)
            if has_nan or (has_nan is None and self._finds_nan(released)):
                self.with_nan.append(key)
            yield key
        for key in keys:
            if (one := self.quantized.get(key[skip:])) is not None:
                stored = one.with_codes(file.get_tensor(key))
                self._load_quantized(
                    self.found[key[skip:]], one.format, {k: x.to(self.device) for k, x in stored.items()}
                )
                if any(_has_nan(side) for side in one.sides.values()):
                    self.with_nan.append(key)
                yield key

    def _load_quantized(self, transform: Transform, format_: WeightFormat, stored: StoredRows) -> None:
        """Take what a file holds in few bits: as it is, where this is how it is wanted, else multiplied out."""
        if self._stays_stored(transform, format_):
            self._assign_stored(transform, stored)
            return
        weight = format_.dequantize(stored)
        if isinstance(transform, Slice):
            transform.rows_of(self._whole(transform.ours, torch.float32)).copy_(weight)
        self._assign(transform, weight)

    def _stays_stored(self, transform: Transform, format_: WeightFormat) -> bool:
        quantization = self.quantization
        return (
            quantization is not None
            and quantization.format is format_
            and isinstance(transform, MOVES_ROWS)
            and all(quantization.covers(self.model, name) for name in transform.our_names)
        )

    def _assign_stored(self, transform: Transform, stored: StoredRows) -> None:
        """Put codes and scales where they belong: their rows are moved as those of the weight are."""
        assert self.quantization is not None, "as _stays_stored says"
        if isinstance(transform, Slice):
            n = len(get_tensor(self.model, transform.ours))
            whole = self._stored_wholes.setdefault(
                transform.ours, {suffix: part.new_empty(n, *part.shape[1:]) for suffix, part in stored.items()}
            )
            for suffix, part in stored.items():
                transform.rows_of(whole[suffix]).copy_(part)
            if self._is_complete(transform):
                self.quantization.put(self.model, transform.ours, self._stored_wholes.pop(transform.ours))
            return
        ours = [get_tensor(self.model, name) for name in transform.our_names]
        parts = {suffix: transform.to_ours(part, ours) for suffix, part in stored.items()}
        for i, name in enumerate(transform.our_names):
            # copies: a file's mapping is not held for them, and what was split shares no memory
            self.quantization.put(self.model, name, {suffix: some[i].clone() for suffix, some in parts.items()})

    def _read(self, file: OpenWeights, keys: Sequence[str], skip: int) -> Iterator[tuple[str, Tensor, bool | None]]:
        requests = (Request(key, self._target(key, skip), may_map=self._maps(file, key, skip)) for key in keys)
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

    def _target(self, key: str, skip: int) -> Tensor | None:
        """The memory of a tensor that is a part of a parameter; None for any other."""
        transform = self.found[key[skip:]]
        if not isinstance(transform, Slice):
            return None
        return transform.rows_of(self._whole(transform.ours, self.dtype))

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """The memory of a parameter that several tensors fill."""
        if name not in self._wholes:
            self._wholes[name] = torch.empty(get_tensor(self.model, name).shape, dtype=dtype, device=self.device)
        return self._wholes[name]

    def _is_complete(self, transform: Slice) -> bool:
        """Count a part of a parameter; whether it was the last that was missing."""
        self._n_shares[transform.ours] = self._n_shares.get(transform.ours, 0) + transform.length
        return self._n_shares[transform.ours] == transform.of

    def _assign(self, transform: Transform, released: Tensor) -> None:
        if isinstance(transform, Slice):
            if self._is_complete(transform):
                self._put(transform.ours, self._wholes.pop(transform.ours))
            return
        ours = [get_tensor(self.model, name) for name in transform.our_names]
        for name, tensor in zip(transform.our_names, transform.to_ours(released, ours), strict=True):
            self._put(name, _with_own_storage(tensor))

    def _put(self, name: str, tensor: Tensor) -> None:
        if self.quantization and self.quantization.covers(self.model, name):
            self.quantization.put(self.model, name, self.quantization.format.quantize(tensor))
        else:
            set_tensor(self.model, name, tensor.to(self.dtype))

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
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(own).view(tensor.shape)


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


def loadable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model that files hold, by their names; those of quantized linears are none."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        found |= {
            prefix + leaf: buffer
            for leaf, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
            if leaf not in module._non_persistent_buffers_set
        }
    return found
