"""Errors as answers: OpenAI's shape, the library's words."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from unimm.serving.events import (
    DeadlineError,
    EngineStoppedError,
    QueueFullError,
    RequestCancelledError,
)

LOG = logging.getLogger(__name__)
INVALID = "invalid_request_error"
# status, type and code of what a model or the engine raises; the first kind that fits
REPLIES: dict[type[BaseException], tuple[int, str, str]] = {
    QueueFullError: (429, "rate_limit_error", "queue_full"),
    EngineStoppedError: (503, "server_error", "stopping"),
    DeadlineError: (504, "timeout_error", "deadline"),
    RequestCancelledError: (499, INVALID, "cancelled"),
    NotImplementedError: (400, INVALID, "not_supported"),
    MemoryError: (400, INVALID, "too_large"),
    ValueError: (400, INVALID, "invalid_value"),
}


@dataclass(frozen=True)
class ErrorReply:
    """An error's status, body and headers."""

    status: int
    message: str
    type: str = INVALID
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_response(self) -> Response:
        """The answer; its JSON is ASCII, since a message may quote half a character."""
        headers = dict(self.headers)
        return Response(json.dumps(self.to_json()), self.status, headers=headers, media_type="application/json")

    def to_json(self) -> dict[str, Any]:
        """The body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class HttpError(Exception):
    """An error that is an answer already."""

    def __init__(self, reply: ErrorReply):
        super().__init__(reply.message)
        self.reply = reply


def error_reply(error: BaseException) -> ErrorReply:
    """The answer that an error makes. What is neither the client's nor the engine's is a 500 without its words."""
    if isinstance(error, HttpError):
        return error.reply
    if isinstance(error, ValidationError):
        return _validation_reply(error)
    for kind, (status, error_type, code) in REPLIES.items():
        if isinstance(error, kind):
            return ErrorReply(status, str(error), error_type, code, headers=_retry_after(error))
    LOG.error("a request failed", exc_info=error)
    return ErrorReply(500, "the server failed over this request: try again", "server_error", "internal_error")


def _retry_after(error: BaseException) -> dict[str, str]:
    """When to try again, in seconds, where an error says so."""
    if isinstance(error, QueueFullError):
        return {"Retry-After": str(error.retry_after)}
    return {"Retry-After": "5"} if isinstance(error, EngineStoppedError) else {}


# what was expected, by the kind of pydantic's error; its own words speak of classes
EXPECTED = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_long": "at most {max_length} characters",
    "literal_error": "{expected}",
    "union_tag_invalid": "type {expected_tags}",
    "union_tag_not_found": "an object with its type",
    "string_unicode": "valid Unicode",
    "finite_number": "a finite number",
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "a string",
    "list_type": "a list",
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "an object"),
}


def _validation_reply(error: ValidationError) -> ErrorReply:
    first = error.errors(include_url=False, include_input=True)[0]
    param = param_name(first["loc"])
    if first["type"] == "extra_forbidden":
        return ErrorReply(400, f"got an unknown field {param}: leave it out", INVALID, "unknown_parameter", param)
    if first["type"] == "missing":
        return ErrorReply(400, f"got no {param}: expected one", INVALID, "missing_required_parameter", param)
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in EXPECTED:
        expected = EXPECTED[first["type"]].format(**first.get("ctx", {}))
        message = f"got {param or 'a name'} {first['input']!r:.80}: expected {expected}"
    return ErrorReply(400, message, INVALID, "invalid_value", param)


def param_name(loc: Sequence[int | str]) -> str | None:
    """Where in a body an error is, as in messages.0.content; None for all of it."""
    # after the index of a part of a message its type, by which its class was chosen, is no name in the body
    is_type = [i > 0 and isinstance(loc[i - 1], int) and one in ("text", "image_url") for i, one in enumerate(loc)]
    return ".".join(str(one) for one, skip in zip(loc, is_type, strict=True) if not skip) or None


def model_not_found(name: str, known: Any) -> ErrorReply:
    """The answer for a model that is not served."""
    message = f"got model {name!r:.80}: expected one of {', '.join(known)}"
    return ErrorReply(404, message, INVALID, "model_not_found", "model")
