"""What stands before every endpoint: keys, hosts, the size of bodies, and the time that reading them may take."""

import asyncio
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unimm.serving.errors import ErrorReply, HttpError
from unimm.serving.limits import ServingLimits

OPEN_PATHS = ("/health",)  # answered without a key
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class AccessRules:
    """Who may ask. api_keys: any of them, none for everyone. hosts: what a Host header may name, () for anything.

    A page on the internet can send its visitor's browser to a loopback address under a name of its own: `hosts` refuses
    that name.
    """

    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = LOOPBACK_NAMES

    def is_key(self, given: str) -> bool:
        """Whether this is one of the keys; takes the same time whatever is given."""
        found = False
        for key in self.api_keys:
            found |= hmac.compare_digest(key.encode(), given.encode("utf-8", "surrogateescape"))
        return found

    def refuse(self, path: str, headers: Headers) -> ErrorReply | None:
        """The answer to a request that may not pass."""
        host = headers.get("host", "").rsplit(":", 1)
        name = host[0] if len(host) == 1 or host[1].isdigit() else headers.get("host", "")
        if self.hosts and name.lower() not in self.hosts:
            message = f"got the host {name!r:.80}: expected one of {', '.join(self.hosts)}"
            return ErrorReply(421, message, code="unknown_host")
        if not self.api_keys or path in OPEN_PATHS:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_key(given.strip()):
            return None
        message = "got no API key that is known: send one as Authorization: Bearer KEY"
        headers_out = {"WWW-Authenticate": "Bearer"}
        return ErrorReply(401, message, "authentication_error", "invalid_api_key", headers=headers_out)


class RequestGuard:
    """An ASGI application around another: refuses what may not pass, and bounds bodies."""

    def __init__(self, app: ASGIApp, rules: AccessRules, limits: ServingLimits):
        self.app = app
        self.rules = rules
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        reply = self.rules.refuse(scope["path"], headers) or self._too_long(headers)
        if reply is not None:
            await send_reply(reply, send)
            return
        body = BoundedBody(receive, self.limits)
        started = False

        async def noted_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, body.receive, noted_send)
        except HttpError as error:
            if started:
                raise
            await send_reply(error.reply, send)
        except ClientDisconnect:
            return  # it went before its body had come: nobody is there to answer

    def _too_long(self, headers: Headers) -> ErrorReply | None:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limits.max_body_bytes:
            return body_too_large(self.limits)
        return None


class BoundedBody:
    """The messages of a request: its body up to a size, and each part of it within a time."""

    def __init__(self, receive: Receive, limits: ServingLimits):
        self._receive = receive
        self._limits = limits
        self._n_bytes = 0
        self._is_whole = False

    async def receive(self) -> Message:
        """The next message. Raises HttpError for a body that is too long, or too slow."""
        if self._is_whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._limits.read_timeout_s)
        except TimeoutError:
            text = f"the body did not come in {self._limits.read_timeout_s:g} seconds: send it faster"
            raise HttpError(ErrorReply(408, text, "timeout_error", "slow_body")) from None
        self._n_bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._n_bytes > self._limits.max_body_bytes:
            raise HttpError(body_too_large(self._limits))
        return message


def body_too_large(limits: ServingLimits) -> ErrorReply:
    """The answer to a body beyond the limit."""
    message = f"got a body of more bytes than {limits.max_body_bytes:,}: send smaller images, or fewer"
    return ErrorReply(413, message, code="body_too_large")


def reply_parts(reply: ErrorReply) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an error's answer; the connection ends with it, since the request may not have been read."""
    body = json.dumps(reply.to_json()).encode()
    pairs: Sequence[tuple[str, str]] = (
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("connection", "close"),
        *reply.headers.items(),
    )
    return [(name.lower().encode(), value.encode()) for name, value in pairs], body


async def send_reply(reply: ErrorReply, send: Send) -> None:
    """Answer with an error."""
    headers, body = reply_parts(reply)
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
