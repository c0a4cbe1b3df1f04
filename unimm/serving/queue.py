"""The waiting requests: bounded, and clients take turns."""

import math
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from unimm.serving.events import QueueFullError
from unimm.serving.worker import Choice


class FairQueue:
    """Waiting choices of each client in order; one choice of each client in turn, whoever has sent more."""

    def __init__(self, max_waiting: int):
        self.max_waiting = max_waiting
        self.n_refused = 0
        self._by_client: OrderedDict[str, deque[Choice]] = OrderedDict()
        self._left: deque[float] = deque(maxlen=32)  # when the last choices left the queue

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def __iter__(self) -> Iterator[Choice]:
        return iter([choice for some in self._by_client.values() for choice in some])

    def put(self, choices: Sequence[Choice], *, client: str) -> None:
        """Add a request's choices. Raises QueueFullError where more would wait than may."""
        if len(self) + len(choices) > self.max_waiting:
            self.n_refused += 1
            raise QueueFullError(
                f"{len(self)} answers wait and {self.max_waiting} may: try again in {self.retry_after} seconds",
                self.retry_after,
            )
        self._by_client.setdefault(client, deque()).extend(choices)

    @property
    def retry_after(self) -> int:
        """Seconds until about a quarter of the queue is worked off, by the pace of the last ones; 1 to 60."""
        if len(self._left) < 2:
            return 1
        pace = (time.monotonic() - self._left[0]) / len(self._left)
        return min(60, max(1, math.ceil(pace * len(self) / 4)))

    def peek(self) -> Choice | None:
        """The choice whose turn it is."""
        return next(iter(self._by_client.values()))[0] if self._by_client else None

    def pop(self) -> Choice:
        """Take the choice whose turn it is; its client goes to the end of the line."""
        client, choices = next(iter(self._by_client.items()))
        choice = choices.popleft()
        self._left.append(time.monotonic())
        if choices:
            self._by_client.move_to_end(client)
        else:
            del self._by_client[client]
        return choice

    def drop_ended(self) -> None:
        """Leave out choices whose requests have ended: cancelled, or late."""
        for client in list(self._by_client):
            kept = deque(one for one in self._by_client[client] if not one.ticket.has_ended)
            if kept:
                self._by_client[client] = kept
            else:
                del self._by_client[client]
