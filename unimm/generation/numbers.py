"""Numbers and truth values as callers give them: Python's, numpy's and torch's. Every such option is read by these.

Raises ValueError, with the option's name, for anything else: texts, nan and infinity; for numbers, truth values and None.
"""

from math import inf, isfinite
from operator import index
from typing import Any

import numpy as np
import torch


def to_python(value: Any) -> Any:
    """A number, or lists of them, in place of numpy's and torch's; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else value


MOST = 2**20  # of anything that a call makes so many of: more fill the memory before they are refused


def parse_int(value: Any, name: str, *, low: int | None = None, high: int | None = None, unit: str = "") -> int:
    """A whole number from `low` to `high`, also of a type of fractions (2.0). unit: of what, for the message."""
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
    if high is not None and whole > high:
        raise ValueError(f"got {name} {value!r:.80}: expected at most {high}")
    return whole


def parse_flag(value: Any, name: str) -> bool:
    """A truth value, also numpy's and torch's, 0 and 1; None is False. A text is none: "false" would be true."""
    flag = to_python(value)
    if flag is None:
        return False
    if not isinstance(flag, bool | int) or flag not in (0, 1):
        raise ValueError(f"got {name} {value!r:.80}: expected True or False")
    return bool(flag)


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
