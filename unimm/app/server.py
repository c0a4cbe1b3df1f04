"""The page over HTTP: a browser that shows it fetches nothing from anybody but this server."""

import signal
import socket
from typing import Any, NoReturn

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unimm.app.page import STYLE
from unimm.serving.guard import LOOPBACK_NAMES, AccessRules, RequestGuard
from unimm.serving.limits import ServingLimits
from unimm.serving.server import uvicorn_config

# of the system: Gradio's own theme fetches fonts from elsewhere
FONTS = ("system-ui", "sans-serif")
CODE_FONTS = ("ui-monospace", "monospace")
# the browser asks nobody else, whatever a component or an answer names; Gradio's scripts stand in the page itself
CONTENT_SECURITY_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
SECONDS_TO_CLOSE = 2  # for connections that are open when the server stops


class BrowserPolicy:
    """An ASGI application around the page that tells the browser what it may fetch."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back with the policy."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = CONTENT_SECURITY_POLICY
                headers["referrer-policy"] = "no-referrer"
            await send(message)

        await self.app(scope, receive, send_with_policy)


def page_rules(host: str, *, no_auth: bool) -> AccessRules:
    """Who may ask for the page at an address. Raises ValueError for one that others reach, unless that is meant."""
    is_loopback = host in {"localhost", "::1"} or host.startswith("127.")
    if not (is_loopback or no_auth):
        raise ValueError(f"got --host {host}: anybody who reaches it could use it; give --no-auth where that is meant")
    return AccessRules(hosts=LOOPBACK_NAMES if is_loopback else ())


def page_application(page: Any, *, rules: AccessRules, limits: ServingLimits) -> ASGIApp:
    """The ASGI application of a page, without Gradio's programming interface, footer and history."""
    application = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=True,
        max_file_size=limits.max_body_bytes,
        theme=gr.themes.Default(font=FONTS, font_mono=CODE_FONTS),
        css=STYLE,
    )
    return RequestGuard(BrowserPolicy(application), rules, limits)


def serve_page(application: ASGIApp, sock: socket.socket, *, limits: ServingLimits) -> None:
    """Serve on a socket that listens, until SIGINT or SIGTERM, which then raise SystemExit(0). In the main thread."""
    config = uvicorn_config(application, limits)
    config.timeout_graceful_shutdown = SECONDS_TO_CLOSE
    # uvicorn closes its connections on either signal, then raises it again for the handler that stood here before
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, _leave)
    uvicorn.Server(config).run(sockets=[sock])


def _leave(_number: int, _frame: Any) -> NoReturn:
    raise SystemExit(0)
