"""Answers that follow a ticket: server-sent events as they come, and waiting for the whole; both end with the client."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from unimm.serving.errors import error_reply
from unimm.serving.events import ServingError
from unimm.serving.ticket import Answer, Ticket
from unimm.serving.worker import REQUEST_ERRORS

T = TypeVar("T")
# what a ticket may end with: of the request, or of the engine
TICKET_ERRORS = (*REQUEST_ERRORS, ServingError)


def server_sent_event(data: Any, *, event: str | None = None) -> bytes:
    """One event, its data as JSON or, for a str, as it is."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return ((f"event: {event}\n" if event else "") + f"data: {text}\n\n").encode()


async def wait_disconnected(receive: Receive) -> None:
    """Return once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(request: Request, tickets: list[Ticket], work: Awaitable[T]) -> T:
    """The result of work; where the client goes first, the tickets are cancelled."""
    watch = asyncio.ensure_future(wait_disconnected(request.receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({watch, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            for ticket in tickets:
                ticket.cancel()
        return await task
    finally:
        watch.cancel()
        for ticket in tickets:
            ticket.cancel()


async def collect(ticket: Ticket) -> list[Answer]:
    """The whole answer, one for each of `n`."""
    answers = [Answer() for _ in range(ticket.n)]
    async for event in ticket:
        answers[event.choice].add(event)
    return answers


class EventStreamResponse(Response):
    """Server-sent events of a ticket. It ends, and the ticket is cancelled, when the client goes or reads too slowly.

    An error after the first event is an event of its own, in OpenAI's shape.
    """

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, events: AsyncIterator[bytes]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.ticket = ticket
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        watch = asyncio.ensure_future(wait_disconnected(receive))
        task = asyncio.ensure_future(self._send_all(send))
        try:
            await asyncio.wait({watch, task}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.ticket.cancel()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            else:
                task.result()
        finally:
            watch.cancel()
            self.ticket.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in guarded(self.events):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def guarded(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same events, and an error as the last one."""
    try:
        async for chunk in events:
            yield chunk
    except TICKET_ERRORS as error:
        yield server_sent_event(error_reply(error).to_json(), event="error")
