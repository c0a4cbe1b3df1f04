"""Which implementation of an op runs: the environment variable UNIMM_KERNELS, or a context manager."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "sdpa", "triton", "flex")
HAS_TRITON = find_spec("triton") is not None
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_MAX_HEAD_DIM = 256  # a wider head does not fit the registers

_context_backend: ContextVar[str | None] = ContextVar("unimm_kernels", default=None)
_graph_backend: str | None = (
    None  # the same for graphs, which not every PyTorch lets look into a ContextVar; of all threads
)


def get_backend() -> str:
    """The backend asked for: the innermost `use_kernels`, else UNIMM_KERNELS, else "auto"."""
    name = _graph_backend if torch.compiler.is_compiling() else _context_backend.get()
    return _check_backend(name or os.environ.get("UNIMM_KERNELS", "auto"))


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Run the body with one backend.

    auto: Triton for CUDA tensors where it is installed, else sdpa. reference: plain operations, the definition.
    sdpa: PyTorch's fused attention, split by sample and block, and plain operations for other ops. triton. flex:
    PyTorch's FlexAttention, compiled; other ops as in auto.
    A backend that cannot run is a ValueError with the reason, when an op is called.
    """
    global _graph_backend  # noqa: PLW0603 - a graph is guarded by a global alone
    token, before = _context_backend.set(_check_backend(name)), _graph_backend
    _graph_backend = name
    try:
        yield
    finally:
        _context_backend.reset(token)
        _graph_backend = before


def resolve_backend(op: str, *tensors: Tensor) -> str:
    """The backend that runs `op` on these tensors, never "auto". Raises ValueError where one is asked for that cannot."""
    name = get_backend()
    if name == "auto" or (name == "flex" and op != "attention"):  # flex is a way of attention alone
        return "triton" if tensors[0].is_cuda and unsupported_reason(op, "triton", *tensors) is None else "sdpa"
    if reason := unsupported_reason(op, name, *tensors):
        raise ValueError(
            f"{op}: backend {name!r} was asked for, but {reason}; or choose 'auto' (UNIMM_KERNELS, use_kernels)"
        )
    return name


def unsupported_reason(op: str, name: str, *tensors: Tensor) -> str | None:
    """Why a backend cannot run `op` on these tensors, and what to do; None where it can."""
    return (
        _triton_unsupported_reason(op, tensors[0])
        if name == "triton"
        else _flex_unsupported_reason(tensors)
        if name == "flex"
        else None
    )


def _triton_unsupported_reason(op: str, x: Tensor) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed: pip install triton"
    if x.dtype not in TRITON_DTYPES:
        return f"its kernels take float16, bfloat16 and float32, got {x.dtype}: cast"
    if op == "attention" and x.shape[-1] > TRITON_MAX_HEAD_DIM:
        return f"its kernels take heads up to {TRITON_MAX_HEAD_DIM} wide, got {x.shape[-1]}"
    if not x.is_cuda and not interpreter_enabled():
        return f"got {x.device.type} tensors: move them to cuda, or set TRITON_INTERPRET=1 to interpret the kernels"
    return None


def _flex_unsupported_reason(tensors: tuple[Tensor, ...]) -> str | None:
    if not tensors[0].is_cuda and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return f"it has no gradient on {tensors[0].device.type}: use torch.no_grad(), or move the tensors to cuda"
    return None


@torch.compiler.assume_constant_result
def interpreter_enabled() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors: TRITON_INTERPRET=1 before they are first imported."""
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
