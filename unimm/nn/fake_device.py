"""A step without values: floats are shapes and types alone, and what is alive of them is counted.

Whole numbers and truth values are computed, so that indices, lengths and masks are those of a real step; those that are
chosen by floats, as a sampled token is, are 0. Kernels are chosen as on the device that is planned for, and a Triton
kernel counts as its op's inputs and outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from unimm.kernels.cross_entropy import OP_BODIES
from unimm.kernels.dispatch import plan_for_device

# ops that take masks as indices: what these pick would be of unknown size
INDEXING = frozenset(
    (
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_put.default,
        torch.ops.aten.index_put_.default,
        torch.ops.aten._index_put_impl_.default,
    )
)


# ops that choose by floats: without values they choose the first
CHOOSING = frozenset((torch.ops.aten.argmax.default, torch.ops.aten.multinomial.default))


@dataclass
class LiveBytes:
    """Bytes that are alive: of gradients, and of all else that a step makes."""

    activations: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.gradients


@dataclass
class MetStorage:
    """What is known of a storage: its bytes as they count, and whether it is a gradient's."""

    n_bytes: int
    is_gradient: bool = False


class FakeDevice(TorchDispatchMode):
    """Runs code on floats without values, and counts their bytes, inside of `run`."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = LiveBytes()
        self.peak = LiveBytes()
        # the storages that were met, by which a `MetStorage` is found; those of weights count nothing
        self.storages = WeakIdKeyDictionary(ref_type=weakref.ref)
        # tensors with values -> what stands for them beside tensors without
        self.twins = WeakTensorKeyDictionary()

    # ---- use

    def place(self, model: nn.Module, *, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        """Replace a model's floats by tensors without values, which are not counted. dtypes: of parameters by name, if
        not their own."""
        dtypes = dtypes or {}
        placed: dict[int, Tensor] = {}
        for path, module in model.named_modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or not tensor.is_floating_point():
                        continue
                    if id(tensor) not in placed:
                        dtype = dtypes.get(f"{path}.{name}" if path else name, tensor.dtype)
                        placed[id(tensor)] = self._without_values(tensor, dtype)
                    tensors[name] = placed[id(tensor)]

    def _without_values(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        with self.fake:
            fake = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        self.storages[fake.untyped_storage()] = MetStorage(0)
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake

    @contextmanager
    def run(self) -> Iterator[None]:
        """Inside of the body, tensors that were placed have no values; nothing is compiled.

        Raises ValueError where a shape, or a branch, depends on the values of floats.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(plan_for_device(self.device_type))
            stack.enter_context(self.fake)
            stack.enter_context(self)
            try:
                yield
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ValueError(
                    f"a step without values cannot go on where they decide on it ({error.func})"
                ) from error

    def count_gradients(self, parameters: Iterable[nn.Parameter], *, held: Mapping[int, int] | None = None) -> None:
        """Count what becomes the gradient of these as such, from when it is whole. held: the bytes that count from then
        on, by the parameters' ids, if not its own."""
        for p in parameters:
            p.register_post_accumulate_grad_hook(partial(self._mark_gradient, n_bytes=(held or {}).get(id(p))))

    def _mark_gradient(self, p: Tensor, *, n_bytes: int | None) -> None:
        assert p.grad is not None, "it was just added to"
        met = self.storages[p.grad.untyped_storage()]
        if not met.is_gradient:
            self.live.activations -= met.n_bytes
            met.is_gradient = True
            met.n_bytes = met.n_bytes if n_bytes is None else n_bytes
            self.live.gradients += met.n_bytes
            self._note_peak()

    # ---- counting

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.storages:
            met = MetStorage(storage.nbytes())
            self.storages[storage] = met
            weakref.finalize(storage, self._free, met).atexit = False
            self.live.activations += met.n_bytes
            self._note_peak()

    def _note_peak(self) -> None:
        if self.live.total > self.peak.total:
            self.peak = replace(self.live)

    def _free(self, met: MetStorage) -> None:
        if met.is_gradient:
            self.live.gradients -= met.n_bytes
        else:
            self.live.activations -= met.n_bytes

    # ---- dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        args, kwargs = tree_map_only(Tensor, self._twin, (args, kwargs))
        if (body := OP_BODIES.get(func._schema.name)) is not None:
            with self:
                return body(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in CHOOSING:
            with unset_fake_temporarily():
                return torch.zeros(out.shape, dtype=out.dtype)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x)
        return out

    def _twin(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor with values, and is alive as long as it is."""
        if isinstance(tensor, FakeTensor) or not tensor.ndim:
            return tensor
        if tensor not in self.twins:
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            self._count(twin)
            self.twins[tensor] = twin
        return self.twins[tensor]


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices in which masks with values are the places where they are true."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or isinstance(index, FakeTensor) or index.dtype not in (torch.bool, torch.uint8):
            found.append(index)
        else:
            with unset_fake_temporarily():
                found += index.nonzero().unbind(1)
    return found
