"""Random choices that are the same for the same key on every machine and under every version of Python."""

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


class SeededRng:
    """The random numbers of one example, from its key."""

    def __init__(self, key: str) -> None:
        self._random = Random(key)

    def _below(self, n: int) -> int:
        """A whole number in 0..n-1."""
        # of all of Python's draws, only random() after a given seed is promised never to change
        return int(self._random.random() * n)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self._below(len(items))]

    def integer(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + self._below(high + 1 - low)

    def coin(self) -> bool:
        """True half of the time."""
        return self._below(2) == 1

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order."""
        left = list(items)
        return [left.pop(self._below(len(left))) for _ in items]
