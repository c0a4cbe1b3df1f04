"""Models without the values of their weights: what loads them leaves them on meta, and no weights are fetched or read."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_is_left_out: ContextVar[bool] = ContextVar("unimm_values_left_out", default=False)


@contextmanager
def without_values() -> Iterator[None]:
    """Build models of their configs alone in the body: their weights have shapes and types."""
    token = _is_left_out.set(True)
    try:
        yield
    finally:
        _is_left_out.reset(token)


def values_left_out() -> bool:
    """Whether weights have no values."""
    return _is_left_out.get()


def needed_steps(n: int) -> int:
    """Of n steps that are alike in what they take, as many as are to be done: all, or one where weights have no values."""
    return min(n, 1) if values_left_out() else n
