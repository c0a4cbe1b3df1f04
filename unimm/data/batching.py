"""Which tasks a batch is made of."""

from __future__ import annotations

import random
from collections.abc import Mapping


def dealt(tasks: Mapping[str, int], size: int, dice: random.Random) -> list[str]:
    """The task of each of `size` samples: every task as often as it says, and what is left drawn by these weights.

    Tasks that say more than `size` together are a deck, and a batch is a hand of it: a share of each, on average.
    """
    deck = [task for task, n in tasks.items() for _ in range(n)]
    if len(deck) > size:
        return dice.sample(deck, size)
    return deck + dice.choices(deck, k=size - len(deck))
