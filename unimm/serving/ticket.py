"""A request in the engine, as its client sees it: events as they come, the whole answer, or its cancellation."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from unimm.serving.events import ChoiceDone, DeadlineError, Event, ImageDone, RequestCancelledError, TextPiece


@dataclass
class Answer:
    """One of the `n` answers to a request: its outputs in order, and what was said before them."""

    outputs: list[str | Image.Image] = field(default_factory=list)
    reasoning: str = ""
    done: ChoiceDone | None = None

    @property
    def text(self) -> str:
        """Its texts, one after the other."""
        return "".join(one for one in self.outputs if isinstance(one, str))

    @property
    def images(self) -> list[Image.Image]:
        """Its images."""
        return [one for one in self.outputs if isinstance(one, Image.Image)]

    def add(self, event: Event) -> None:
        """Take one of its events."""
        if isinstance(event, TextPiece):
            if event.channel == "reasoning":
                self.reasoning += event.text
            elif self.outputs and isinstance(self.outputs[-1], str):
                self.outputs[-1] += event.text
            else:
                self.outputs.append(event.text)
        elif isinstance(event, ImageDone):
            self.outputs.append(event.image)
        elif isinstance(event, ChoiceDone):
            self.done = event


class Ticket:
    """A submitted request. Iterate over it for its events, `for` or `async for`; either raises the error it ended with.

    One reader at a time: an event is given once. `result` waits for the whole answer. Threads are safe: the engine
    writes, the client reads and may `cancel` at any time.
    """

    def __init__(self, *, model: str, n: int, timeout_s: float):
        self.model = model
        self.n = n
        self.submitted = time.monotonic()
        self.deadline = self.submitted + timeout_s
        self.timeout_s = timeout_s
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._listener: Callable[[], Any] | None = None
        self._n_left = n
        self.error: BaseException | None = None
        self.is_cancelled = False

    # ---- the client's side

    def cancel(self) -> None:
        """Stop working on the request; what comes of it is dropped. Nothing happens to one that has ended."""
        self.is_cancelled = True
        self.fail(RequestCancelledError("the request was cancelled"))

    @property
    def has_ended(self) -> bool:
        """Whether no more events come."""
        return self._n_left == 0 or self.error is not None

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                while not self._events and not self.has_ended:
                    self._changed.wait()
                event = self._take()
            if event is None:
                return
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        with self._changed:
            self._listener = partial(loop.call_soon_threadsafe, woken.set)
        try:
            while True:
                woken.clear()
                with self._changed:
                    is_waiting = not self._events and not self.has_ended
                    event = None if is_waiting else self._take()
                if is_waiting:
                    await woken.wait()
                elif event is None:
                    return
                else:
                    yield event
        finally:
            self._listener = None

    def _take(self) -> Event | None:
        """The next event; None at the end. Raises the request's error once its events are taken."""
        if self._events:
            return self._events.popleft()
        if self.error is not None:
            raise self.error
        return None

    def result(self) -> list[Answer]:
        """Wait for the whole answer, one for each of `n`. Raises the error that the request ended with."""
        answers = [Answer() for _ in range(self.n)]
        for event in self:
            answers[event.choice].add(event)
        return answers

    # ---- the engine's side

    def put(self, event: Event) -> None:
        """Give an event to the client."""
        with self._changed:
            if self.error is None:
                self._events.append(event)
                self._n_left -= isinstance(event, ChoiceDone)
                self._wake()

    def fail(self, error: BaseException) -> None:
        """End the request with an error, unless it has ended."""
        with self._changed:
            if not self.has_ended:
                self.error = error
                self._wake()

    def check_deadline(self) -> None:
        """End the request where it is late."""
        if time.monotonic() > self.deadline:
            self.fail(DeadlineError(f"the request was not done in {self.timeout_s:g} seconds: ask for less, or later"))

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._listener is not None:
            try:
                self._listener()
            except RuntimeError:  # the client's event loop is closed: nobody listens any more
                self._listener = None
