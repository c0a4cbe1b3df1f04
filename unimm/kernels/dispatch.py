"""Which implementation of an op runs: the environment variable UNIMM_KERNELS, or a context manager."""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

CHOICES = ("auto", "reference", "sdpa")

_chosen: ContextVar[str | None] = ContextVar("unimm_kernels", default=None)


def backend() -> str:
    """The backend asked for: the innermost `use_kernels`, else UNIMM_KERNELS, else "auto"."""
    return _checked(_chosen.get() or os.environ.get("UNIMM_KERNELS", "auto"))


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Run the body with one backend: "auto", "reference" (dense mask, the definition) or "sdpa"."""
    token = _chosen.set(_checked(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"unknown kernel backend {name!r}: expected one of {', '.join(CHOICES)}; set UNIMM_KERNELS to one")
    return name
