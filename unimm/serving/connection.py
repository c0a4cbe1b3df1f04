"""A client's connection, below the application: how long its head and its reading may take, and answers to no HTTP."""

import asyncio
from typing import Any, cast

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from unimm.serving.errors import ErrorReply
from unimm.serving.guard import reply_parts, send_reply
from unimm.serving.limits import ServingLimits


class BoundedConnection(H11Protocol):
    """HTTP/1.1 of uvicorn, which ends where a client sends no whole head in time, or does not read what it asked for.

    Connections beyond the limit are answered by 503, what is no HTTP by 400; both in OpenAI's shape.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ServingLimits,
    ):
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection, or refuse it."""
        super().connection_made(cast(asyncio.Transport, transport))
        if len(self.connections) > self._limits.max_connections:
            self.app = cast(Any, self._refuse)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        super().connection_lost(exc)
        self._stop_head_timer()
        self._stop_write_timer()

    # ---- heads

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.read_timeout_s, self._end_late_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_late_head(self) -> None:
        has_begun = bool(self.conn.trailing_data[0])
        if not has_begun:
            self.transport.close()  # whoever sends a request now is not answered by an error of an earlier time
            return
        message = f"the request's head did not come in {self._limits.read_timeout_s:g} seconds: send it faster"
        self._end_with(ErrorReply(408, message, "timeout_error", "slow_head"))

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        limit = 2**14  # h11's own
        message = f"got no valid HTTP/1.1: expected a request with a Host, and a head of at most {limit:,} bytes"
        self._end_with(ErrorReply(400, message, code="invalid_http"))

    def _end_with(self, reply: ErrorReply) -> None:
        """Answer, where the answer has not begun, and end the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers, body = reply_parts(reply)
            events = (h11.Response(status_code=reply.status, headers=headers), h11.Data(data=body), h11.EndOfMessage())
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    # ---- answers

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer comes."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._stop_write_timer()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"{self._limits.max_connections} connections are open and no more may be: try again later"
        headers = {"Retry-After": "1"}
        await send_reply(ErrorReply(503, message, "server_error", "too_many_connections", headers=headers), send)
