"""The engine: the requests of many clients, batched step by step by one thread that owns the models.

How a client uses it:

    engine = Engine({"bagel-nano": unimm.load("bagel-nano")})
    with engine:                                          # starts the thread; leaving drains and stops it
        request = ModelRequest(
            messages=(RequestMessage(role="user", content=("a red circle left of a blue square",)),),
            outputs=("image",),                           # or ("text",), or both in any order where a family can
            seed=3,
        )
        ticket = engine.submit("bagel-nano", request, previews=3)
        for event in ticket:                              # or `async for`: TextPiece, ImagePreview, ImageDone, ChoiceDone
            ...
        answer = engine.submit("bagel-nano", request).result()[0]
        answer.images, answer.text, answer.reasoning      # as `model.generate` and `understand` for the same seed
        ticket.cancel()                                   # at any time, from any thread

To edit, put images before the text in `content`; for a conversation give several messages; `think=True` writes the
reasoning first. `submit` raises ValueError or NotImplementedError for a request that the model cannot take, MemoryError
for one that can never fit, QueueFullError (with `retry_after`) where too many wait, EngineStoppedError once it stops.
What comes later is raised where the ticket is read. See ServingLimits for what a server takes.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType

import torch
from typing_extensions import Self

from unimm.generation.stepwise import ModelRequest
from unimm.models.base import UnifiedModel
from unimm.serving.events import EngineStoppedError, WorkerFailedError
from unimm.serving.limits import ServingLimits
from unimm.serving.prefix_cache import PrefixCache
from unimm.serving.queue import FairQueue
from unimm.serving.stats import EngineStats
from unimm.serving.ticket import Ticket
from unimm.serving.worker import Choice, ModelWorker

LOG = logging.getLogger(__name__)
PREFIX_SHARE = 8  # the prefixes of a model take at most this part of the memory


class Engine:
    """Models by name, a queue, and the thread that works on the requests of all of them. See this module's text."""

    def __init__(
        self,
        models: Mapping[str, UnifiedModel],
        *,
        limits: ServingLimits | None = None,
    ):
        if not models:
            raise ValueError("got no models to serve: expected at least one")
        self.models = dict(models)
        self.limits = limits or ServingLimits()
        self.stats = EngineStats()
        first = next(iter(self.models.values()))
        self.memory_bytes = self.limits.budget(first.device)
        self.queue = FairQueue(self.limits.max_waiting)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._accepting = False
        self._stopping = False
        self._workers = self._new_workers()

    def _new_workers(self) -> dict[str, ModelWorker]:
        share = self.memory_bytes // PREFIX_SHARE // len(self.models)
        return {name: ModelWorker(PrefixCache(share), self.stats) for name in self.models}

    # ---- life

    def start(self) -> Self:
        """Start the thread."""
        self._accepting = True
        self._stopping = False
        self._start_thread()
        return self

    def stop(self, *, drain_s: float | None = None) -> None:
        """Take no more requests, finish those that are there for at most `drain_s` seconds, and stop the thread.

        What is not done then ends with EngineStoppedError. Unless given, `drain_s` is the limits'.
        """
        end = time.monotonic() + (self.limits.drain_s if drain_s is None else drain_s)
        with self._changed:
            self._accepting = False
            while self.is_alive and (len(self.queue) or self.n_running) and time.monotonic() < end:
                self._changed.wait(0.05)
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._fail_all(EngineStoppedError("the server is stopping: try again later"))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(drain_s=None if error is None else 0.0)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_accepting(self) -> bool:
        """Whether requests are taken."""
        return self._accepting and self.is_alive

    @property
    def n_running(self) -> int:
        """Choices that are worked on."""
        return sum(len(worker.choices) for worker in self._workers.values())

    @property
    def reserved_bytes(self) -> int:
        """The memory of running choices, by estimate."""
        return sum(one.run.n_bytes for worker in self._workers.values() for one in list(worker.choices))

    @property
    def n_reused_tokens(self) -> int:
        """Tokens of prompts that were not prefilled again."""
        return sum(worker.prefixes.n_reused_tokens for worker in self._workers.values())

    # ---- requests

    def submit(
        self,
        model: str,
        request: ModelRequest,
        *,
        n: int = 1,
        previews: int = 0,
        client: str = "",
        timeout_s: float | None = None,
    ) -> Ticket:
        """Queue `n` answers to a request, from its seed and the ones after it. It reads and checks the request first.

        previews: of each image, on the way. client: whose turn it is; clients take turns. Raises as this module says.
        """
        limits = self.limits
        if model not in self.models:
            raise ValueError(f"got model {model!r:.80}: expected one of {', '.join(self.models)}")
        if not 1 <= n <= limits.max_n:
            raise ValueError(f"got n {n}: expected 1 to {limits.max_n}")
        timeout_s = limits.timeout_s if timeout_s is None else min(timeout_s, limits.timeout_s)
        check_request(request, limits)
        ticket = Ticket(model=model, n=n, timeout_s=timeout_s)
        # answer i begins with the seed after the last one of answer i - 1
        seeds = [request.seed + i * max(1, len(request.outputs)) for i in range(n)]
        runs = [self.models[model].start_run(replace(request, seed=seed)) for seed in seeds]
        needed = max(run.n_bytes for run in runs)
        if needed > self.memory_bytes:
            raise MemoryError(
                f"the request needs about {needed / 2**20:.0f} MiB of caches and activations, the server has "
                f"{self.memory_bytes / 2**20:.0f}: ask for a smaller image or fewer tokens"
            )
        choices = [Choice(ticket, i, run, previews=previews) for i, run in enumerate(runs)]
        with self._changed:
            if not self.is_accepting:
                raise EngineStoppedError("the server is stopping: try again later")
            try:
                self.queue.put(choices, client=client)
            finally:
                self.stats.n_refused = self.queue.n_refused
            self.stats.n_requests += 1
            self._changed.notify_all()
        return ticket

    # ---- the thread

    def _supervise(self) -> None:
        """Work until told to stop; where the work itself breaks, say so to its clients and begin anew.

        The error goes on to the thread's hook, which reports it; another thread takes over.
        """
        is_whole = False
        try:
            self._work()
            is_whole = True
        finally:
            if not is_whole:
                LOG.error("the engine's work broke and begins anew")
                self.stats.n_restarts += 1
                running = [choice for worker in self._workers.values() for choice in worker.choices]
                self._workers = self._new_workers()
                for choice in running:
                    choice.give_up(WorkerFailedError("the server failed over this request: try again"))
                self._start_thread()

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._supervise, name="unimm-engine", daemon=True)
        self._thread.start()

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self.n_running or len(self.queue) or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    return
                self._drop_late()
                self._admit()
            for worker in self._workers.values():
                if worker.choices:
                    worker.advance()
            with self._changed:
                self._changed.notify_all()

    def _drop_late(self) -> None:
        """End the requests whose time is over, waiting or running."""
        for choice in [*self.queue, *(one for worker in self._workers.values() for one in worker.choices)]:
            choice.ticket.check_deadline()
        self.queue.drop_ended()

    def _admit(self) -> None:
        """Begin as many waiting choices as there is room for, clients in turn; the next in turn is not passed by."""
        running = [one for worker in self._workers.values() for one in worker.choices]
        free = self.memory_bytes - sum(one.run.n_bytes for one in running)
        n = len(running)
        while (choice := self.queue.peek()) is not None:
            if n and (n >= self.limits.max_running or choice.run.n_bytes > free):
                return
            self.queue.pop()
            self._workers[choice.ticket.model].add(choice)
            free -= choice.run.n_bytes
            n += 1

    def _fail_all(self, error: BaseException) -> None:
        for choice in [*self.queue, *(one for worker in self._workers.values() for one in worker.choices)]:
            choice.give_up(error)
        self.queue.drop_ended()
        for worker in self._workers.values():
            worker.drop_ended()


def check_request(request: ModelRequest, limits: ServingLimits) -> None:
    """Raise ValueError for a request beyond the limits."""
    if (tokens := request.text_sampling.max_tokens) is not None and tokens > limits.max_tokens:
        raise ValueError(f"got max_tokens {tokens}: expected at most {limits.max_tokens}")
    if request.steps is not None and request.steps > limits.max_steps:
        raise ValueError(f"got steps {request.steps}: expected at most {limits.max_steps}")
    if request.size is not None and request.size[0] * request.size[1] > limits.max_image_pixels:
        raise ValueError(f"got size {request.size}: expected at most {limits.max_image_pixels:,} pixels")
