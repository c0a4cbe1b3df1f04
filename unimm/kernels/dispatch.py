"""The implementation of an op that runs: chosen by the environment variable UNIMM_KERNELS or by a context manager."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

BACKENDS = ("auto", "reference", "sdpa", "triton", "flex")
HAS_TRITON = find_spec("triton") is not None
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_MAX_HEAD_DIM = 256  # wider heads do not fit the registers

_context_backend: ContextVar[str | None] = ContextVar("unimm_kernels", default=None)
# the device that kernels are chosen for where tensors have no values
_planned_device: ContextVar[str | None] = ContextVar("unimm_planned_device", default=None)
# the same as the first for compiled graphs, since not every PyTorch can trace a ContextVar; shared by all threads
_graph_backend: str | None = None


def constant_in_graphs(function: F) -> F:
    """Mark a function whose result a graph may hold as a constant, as torch.compiler.assume_constant_result does.

    That decorator imports torch._dynamo at once, which takes as long as importing torch; a test holds the two together.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def get_backend() -> str:
    """The requested backend: the innermost `use_kernels`, else UNIMM_KERNELS, else "auto"."""
    name = _graph_backend if torch.compiler.is_compiling() else _context_backend.get()
    return _check_backend(name or os.environ.get("UNIMM_KERNELS", "auto"))


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Run the body with one backend.

    auto: Triton for CUDA tensors where it is installed, else sdpa. reference: plain operations, the definition.
    sdpa: PyTorch's fused attention, split by sample and key range, and plain operations for other ops. triton: the
    Triton kernels. flex: PyTorch's FlexAttention, compiled; other ops as in auto. A backend that cannot run raises
    ValueError, with the reason, when an op is called.
    """
    global _graph_backend  # noqa: PLW0603 - compiled graphs are guarded by a global, not by a ContextVar
    token = _context_backend.set(_check_backend(name))
    before = _graph_backend
    _graph_backend = name
    try:
        yield
    finally:
        _context_backend.reset(token)
        _graph_backend = before


@contextmanager
def plan_for_device(name: str) -> Iterator[None]:
    """Choose kernels in the body as for tensors on a device of this type, wherever they are: to count what a step would
    take with tensors that have no values (unimm.nn.fake_device)."""
    token = _planned_device.set(name)
    try:
        yield
    finally:
        _planned_device.reset(token)


def planned_device() -> str | None:
    """The type of the device that is planned for; None where nothing is planned."""
    return None if torch.compiler.is_compiling() else _planned_device.get()


def device_type(x: Tensor) -> str:
    """The type of a tensor's device, or of the one that is planned for."""
    return planned_device() or x.device.type


def resolve_backend(op: str, *tensors: Tensor) -> str:
    """The backend that runs `op` on these tensors, never "auto". Raises ValueError where the requested one cannot."""
    name = get_backend()
    if name == "auto" or (name == "flex" and op != "attention"):  # flex is an implementation of attention alone
        return (
            "triton"
            if device_type(tensors[0]) == "cuda" and unsupported_reason(op, "triton", *tensors) is None
            else "sdpa"
        )
    if reason := unsupported_reason(op, name, *tensors):
        raise ValueError(
            f"{op}: backend {name!r} was asked for, but {reason}; or choose 'auto' (UNIMM_KERNELS, use_kernels)"
        )
    return name


def unsupported_reason(op: str, name: str, *tensors: Tensor) -> str | None:
    """Why a backend cannot run `op` on these tensors, and what to do about it; None where it can."""
    if name == "triton":
        return _triton_unsupported_reason(op, tensors[0])
    if name == "flex":
        return _flex_unsupported_reason(tensors)
    return None


def _triton_unsupported_reason(op: str, x: Tensor) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed: pip install triton"
    if x.dtype not in TRITON_DTYPES:
        return f"its kernels take float16, bfloat16 and float32, got {x.dtype}: cast"
    if op == "attention" and x.shape[-1] > TRITON_MAX_HEAD_DIM:
        return f"its kernels take heads up to {TRITON_MAX_HEAD_DIM} wide, got {x.shape[-1]}"
    if device_type(x) != "cuda" and not interpreter_enabled():
        return f"got {x.device.type} tensors: move them to cuda, or set TRITON_INTERPRET=1 to interpret the kernels"
    return None


def _flex_unsupported_reason(tensors: tuple[Tensor, ...]) -> str | None:
    if not tensors[0].is_cuda and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return f"it has no gradient on {tensors[0].device.type}: use torch.no_grad(), or move the tensors to cuda"
    return None


@constant_in_graphs
def interpreter_enabled() -> bool:
    """Whether Triton interprets kernels in Python, on CPU tensors: TRITON_INTERPRET=1 before they are imported."""
    if not HAS_TRITON:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"unknown kernel backend {name!r}: expected one of {', '.join(BACKENDS)}; set UNIMM_KERNELS to one"
        )
    return name
