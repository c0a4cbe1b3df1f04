"""Numbers as callers give them: Python's, numpy's and torch's. Every option that is a number is read by these.

Raises ValueError, with the option's name, for anything else: texts, truth values, None, nan and infinity.
"""

from math import inf, isfinite
from operator import index
from typing import Any

import numpy as np
import torch


def to_python(value: Any) -> Any:
    """A number, or lists of them, in place of numpy's and torch's; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else value


def parse_int(value: Any, name: str, *, low: int | None = None, unit: str = "") -> int:
    """A whole number, `low` or more, also of a type of fractions (2.0). unit: of what, for the message."""
    number = to_python(value)
    limit = "" if low is None else f"at least {low}{unit and ' '}{unit}"
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    try:
        whole = None if isinstance(number, bool) else index(number)
    except TypeError:
        whole = None
    if whole is None:
        raise ValueError(f"got {name} {value!r:.80}: expected a whole number" + (f", {limit}" if limit else ""))
    if low is not None and whole < low:
        raise ValueError(f"got {name} {whole}: expected {limit}")
    return whole


def parse_float(value: Any, name: str, expected: str, *, low: float = -inf, high: float = inf) -> float:
    """A finite number from `low` to `high`. expected: these limits in words."""
    number = to_python(value)
    try:
        real = None if isinstance(number, bool | str | bytes) else float(number)
    except (TypeError, ValueError, OverflowError):
        real = None
    if real is None or not isfinite(real) or not low <= real <= high:
        raise ValueError(f"got {name} {value!r:.80}: expected {expected}")
    return real
