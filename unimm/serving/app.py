"""The HTTP application: OpenAI's endpoints over an engine."""

import asyncio
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from PIL import Image
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from unimm.generation.stepwise import ModelRequest
from unimm.serving.chat import ChatAnswer, chat_request, image_sources
from unimm.serving.engine import Engine
from unimm.serving.errors import ErrorReply, HttpError, error_reply, model_not_found
from unimm.serving.guard import AccessRules, RequestGuard
from unimm.serving.image_codec import decode_data_uri, decode_image
from unimm.serving.images import ImagesAnswer, images_request
from unimm.serving.metrics import ServerMetrics
from unimm.serving.remote_images import RemoteImages
from unimm.serving.schemas import ChatBody, ImagesBody, RequestBody
from unimm.serving.streams import TICKET_ERRORS, EventStreamResponse, until_gone
from unimm.serving.ticket import Ticket

Body = TypeVar("Body", bound=RequestBody)
IMAGE_FIELDS = ("image", "image[]")
MAX_FORM_FIELDS = 64
NUMBER_FIELDS = ("n", "seed", "steps", "guidance", "partial_images", "output_compression", "timeout")
JSON_NUMBER = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?")
FLAG_FIELDS = {"true": True, "false": False}


class Api:
    """The endpoints of an engine. remote: how images at addresses are fetched; None where they are refused.

    has_keys: whether a request that comes here has shown an API key.
    """

    def __init__(self, engine: Engine, *, remote: RemoteImages | None = None, has_keys: bool = False):
        self.engine = engine
        self.remote = remote
        self.has_keys = has_keys
        self.metrics = ServerMetrics(engine)
        self.started = int(time.time())

    # ---- about the server

    async def health(self, request: Request) -> Response:
        """200 while requests are taken, 503 while the server starts, drains or has failed."""
        engine = self.engine
        state = {
            "status": "ok" if engine.is_accepting else "stopping",
            "models": list(engine.models),
            "running": engine.n_running,
            "waiting": len(engine.queue),
        }
        return JSONResponse(state, 200 if engine.is_accepting else 503)

    async def models(self, request: Request) -> Response:
        """The models that are served."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.engine.models]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        if name not in self.engine.models:
            raise HttpError(model_not_found(name, self.engine.models))
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        family = type(self.engine.models[name]).__name__
        return {"id": name, "object": "model", "created": self.started, "owned_by": "unimm", "family": family}

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus's text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # ---- answers

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await read_json(request, ChatBody)
        images = await self._images_at(image_sources(body, self.engine.limits))
        previews = body.partial_images or 0 if body.stream else 0
        ticket = await self._submit(request, body, chat_request(body, images), previews=previews)
        answer = ChatAnswer(body, ticket)
        if body.stream:
            return EventStreamResponse(ticket, answer.stream())
        return JSONResponse(await until_gone(request, [ticket], answer.whole()))

    async def generations(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        body = await read_json(request, ImagesBody)
        return await self._answer_images(request, body, [], "image_generation")

    async def edits(self, request: Request) -> Response:
        """POST /v1/images/edits, multipart."""
        body, files = await read_form(request, self.engine.limits.max_input_images)
        limits = self.engine.limits
        images = await asyncio.to_thread(
            lambda: [decode_image(data, limits, place=f"image {i + 1}") for i, data in enumerate(files)]
        )
        return await self._answer_images(request, body, images, "image_edit")

    async def _answer_images(
        self, request: Request, body: ImagesBody, images: Sequence[Image.Image], kind: str
    ) -> Response:
        model_request = images_request(body, images, self.engine.limits)
        previews = body.partial_images or 0 if body.stream else 0
        ticket = await self._submit(request, body, model_request, previews=previews)
        answer = ImagesAnswer(body, ticket, kind)
        if body.stream:
            return EventStreamResponse(ticket, answer.stream())
        return JSONResponse(await until_gone(request, [ticket], answer.whole()))

    async def _submit(
        self, request: Request, body: RequestBody, model_request: ModelRequest, *, previews: int
    ) -> Ticket:
        engine = self.engine
        name = next(iter(engine.models)) if body.model is None else body.model
        if name not in engine.models:
            raise HttpError(model_not_found(name, engine.models))
        # prompts are tokenized and images prepared here, in a thread: the event loop goes on
        return await asyncio.to_thread(
            engine.submit,
            name,
            model_request,
            n=body.n or 1,
            previews=previews,
            client=client_of(request, has_keys=self.has_keys),
            timeout_s=body.timeout,
        )

    async def _images_at(self, sources: Sequence[str]) -> list[Image.Image]:
        return [await asyncio.to_thread(self._image_at, url, f"image {i + 1}") for i, url in enumerate(sources)]

    def _image_at(self, url: str, place: str) -> Image.Image:
        if url.lower().startswith(("http://", "https://")):
            if self.remote is None:
                message = f"got an address for {place}: this server fetches no remote images; send a data URI"
                raise HttpError(ErrorReply(400, message, code="remote_images_off"))
            return decode_image(self.remote.fetch(url), self.engine.limits, place=place)
        return decode_data_uri(url, self.engine.limits, place=place)


def client_of(request: Request, *, has_keys: bool) -> str:
    """Whose turn a request takes: its key's, or its address's where keys are not checked, and could be made up."""
    if has_keys:
        key = request.headers.get("authorization", "")
        return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    return request.client.host if request.client else ""


async def read_json(request: Request, kind: type[Body]) -> Body:
    """A JSON body. Raises HttpError for another kind of content, ValueError for what it says."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        message = f"got content of type {content_type!r:.60}: expected application/json"
        raise HttpError(ErrorReply(415, message, code="unsupported_media_type"))
    data = await request.body()
    try:
        # checked in a thread: a body of many megabytes takes a while
        return await asyncio.to_thread(parse_body, data, kind)
    except RecursionError:
        raise ValueError("got JSON that is nested too deeply: expected a request's body") from None


def parse_body(data: bytes, kind: type[Body]) -> Body:
    """A body from its bytes."""
    try:
        parsed = json.loads(data)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"got a body that is no JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError("got a body that is no JSON object: expected one")
    return kind.model_validate(parsed)


async def read_form(request: Request, max_files: int) -> tuple[ImagesBody, list[bytes]]:
    """The fields of a multipart body, and its images in order. Raises HttpError for another kind of content."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "multipart/form-data":
        message = f"got content of type {content_type!r:.60}: expected multipart/form-data"
        raise HttpError(ErrorReply(415, message, code="unsupported_media_type"))
    fields: dict[str, Any] = {}
    files: list[bytes] = []
    try:
        async with request.form(max_files=max_files, max_fields=MAX_FORM_FIELDS) as form:
            for name, value in form.multi_items():
                if not isinstance(value, str) and name not in IMAGE_FIELDS:
                    raise ValueError(f"got a file {name!r:.40}: expected images as image or image[]; masks are unknown")
                if name in fields:
                    raise ValueError(f"got {name!r:.40} more than once: expected it once")
                if isinstance(value, str):
                    fields[name] = parse_field(name, value)
                else:
                    files.append(await value.read())
    except HTTPException as error:
        raise ValueError(f"got a multipart body that cannot be read: {error.detail}") from None
    if not files:
        raise ValueError("got no image to edit: expected one or several files as image or image[]")
    return ImagesBody.model_validate(fields), files


def parse_field(name: str, value: str) -> Any:
    """A form's field: its numbers and truth values are texts."""
    if value.lower() in FLAG_FIELDS and name in ("stream", "think"):
        return FLAG_FIELDS[value.lower()]
    if name in NUMBER_FIELDS and JSON_NUMBER.fullmatch(value):
        return json.loads(value)
    return value  # what should be a number is refused where it is checked, with its name


def create_app(engine: Engine, *, rules: AccessRules | None = None, remote: RemoteImages | None = None) -> FastAPI:
    """The application of an engine, which starts and stops with it."""
    rules = rules or AccessRules()
    api = Api(engine, remote=remote, has_keys=bool(rules.api_keys))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(engine.start)
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)

    app = FastAPI(title="unimm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.api = api
    routes = (
        ("GET", "/health", api.health),
        ("GET", "/metrics", api.show_metrics),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{name:path}", api.model),
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/v1/images/generations", api.generations),
        ("POST", "/v1/images/edits", api.edits),
    )
    for method, path, endpoint in routes:
        app.add_route(path, endpoint, methods=[method])

    async def answer_error(request: Request, error: Exception) -> Response:
        return error_reply(error).to_response()

    async def answer_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        asked = f"{request.method} {request.url.path}"
        expected = {404: ", ".join(path for _, path, _ in routes), 405: (error.headers or {}).get("Allow")}
        message = f"got {asked!r:.100}: expected {expected.get(error.status_code) or error.detail}"
        return ErrorReply(error.status_code, message, code="http_error", headers=error.headers or {}).to_response()

    for kind in (*TICKET_ERRORS, HttpError, ValidationError, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_middleware(RequestGuard, rules=rules, limits=engine.limits)
    return app
