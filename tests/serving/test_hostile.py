"""Requests that are wrong in unusual ways: each is answered in OpenAI's shape and says what was expected, none by 500,
and none holds a connection, or the server's place, for longer than its limits."""

import asyncio
import base64
import json
import logging
import re
import socket
import struct
import time
import zlib
from contextlib import asynccontextmanager, closing
from functools import partial

import httpx
import pytest
from conftest import listening, serving
from helpers.toys import picture
from starlette.applications import Starlette
from test_http import png

from unimm.serving.engine import Engine
from unimm.serving.limits import ServingLimits
from unimm.serving.streams import EventStreamResponse
from unimm.serving.ticket import Ticket

CHAT = "/v1/chat/completions"
DRAW = "/v1/images/generations"
EDIT = "/v1/images/edits"
LIMITS = ServingLimits(max_connections=6, read_timeout_s=0.5, write_timeout_s=0.5, max_body_bytes=4 * 2**20)


@pytest.fixture(scope="module")
def url(nano):
    with serving(Engine({"bagel-nano": nano}, limits=LIMITS)) as address:
        yield address


def error_of(answer: httpx.Response, status: int = 400) -> dict:
    """The error of an answer, which has this status."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# ---- JSON

ONE = b'"messages": [{"role": "user", "content": "a"}]'


NESTED = b"[" * 50_000 + b"]" * 50_000


@pytest.mark.parametrize(
    "body",
    [NESTED, b'{"messages": ' + NESTED + b"}", b"{" + ONE + b', "metadata": ' + NESTED + b"}"],
    ids=["body", "messages", "metadata"],
)
def test_deep_nesting(url, body):
    answer = httpx.post(url + CHAT, content=body, headers={"Content-Type": "application/json"})
    assert "nested too deeply" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("path", "field", "value", "words"),
    [
        (DRAW, "n", 0, "got n 0: expected at least 1"),
        (DRAW, "n", True, "got n True: expected a whole number"),
        (DRAW, "n", "2", "got n '2': expected a whole number"),
        (DRAW, "n", 1.5, "got n 1.5: expected a whole number"),
        (DRAW, "seed", -1, "got seed -1: expected at least 0"),
        (DRAW, "seed", 2**64, "expected less than 9223372036854775808"),
        (DRAW, "steps", 2.0, "got steps 2.0: expected a whole number"),
        (DRAW, "guidance", "high", "got guidance 'high': expected a number"),
        (DRAW, "stream", "yes", "got stream 'yes': expected true or false"),
        (DRAW, "timeout", 0, "got timeout 0: expected more than 0"),
        (DRAW, "output_format", "gif", "expected 'png', 'jpeg' or 'webp'"),
        (DRAW, "size", "\u0666\u0664x\u0666\u0664", "expected WIDTHxHEIGHT"),
        (DRAW, "prompt", ["a", "b"], "expected a string"),
        (DRAW, "mask", "a", "unknown field mask"),
        (CHAT, "messages", [], "got messages []: expected at least 1 of them"),
        (CHAT, "messages", [1], "got messages.0 1: expected an object"),
        (CHAT, "messages", [{"role": "tool", "content": "a"}], "got messages.0.role 'tool': expected 'system'"),
        (CHAT, "messages", [{"role": "user", "content": [{"type": "text"}]}], "got no messages.0.content.0.text"),
        (CHAT, "messages", [{"role": "user", "content": [{"type": "audio"}]}], "expected type 'text', 'image_url'"),
        (CHAT, "messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}], "expected an object"),
        (CHAT, "messages", [{"role": "user", "content": []}], "empty prompt"),
        (CHAT, "messages", [{"role": "user", "content": 5}], "got content 5: expected a string, or a list of parts"),
        (CHAT, "messages", [{"role": "assistant", "content": "a"}], "does not end with the user"),
        (CHAT, "stop", 5, "got stop 5: expected a string, or a list of strings"),
        (CHAT, "stop", ["x"] * 17, "expected at most 16 of them"),
        (CHAT, "stop", ["x" * 1001], "expected at most 1000 characters"),
        (CHAT, "stop", "", "expected strings of at least one character"),
        (CHAT, "modalities", ["audio"], "got modalities.0 'audio': expected 'text' or 'image'"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(url, path, field, value, words):
    body = {"prompt": "a"} if path == DRAW else {"messages": [{"role": "user", "content": "a"}]}
    message = error_of(httpx.post(url + path, json=body | {field: value}))["message"]
    assert words in message and "Input should" not in message


def test_a_modality_is_answered_once(url):
    body = {"messages": [{"role": "user", "content": "a"}], "modalities": ["text"] * 1000, "max_tokens": 1}
    answer = httpx.post(url + CHAT, json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 1


def test_unknown_paths_and_methods_say_what_there_is(url):
    assert "/v1/chat/completions" in error_of(httpx.post(f"{url}/v1/responses", json={}), 404)["message"]
    answer = httpx.get(url + DRAW)
    assert "expected POST" in error_of(answer, 405)["message"] and answer.headers["Allow"] == "POST"


# ---- images


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that claims a size and has a few rows."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(500))) + chunk(b"IEND", b"")
    )


GOOD = base64.b64encode(png(picture())).decode()
TEXT_BOMB = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(20_000_000)))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("", "expected a data URI"),
        (f"data:text/plain;base64,{GOOD}", "expected a data URI"),
        (f"data:image/png,{GOOD}", "expected a data URI"),
        ("data:image/png;base64,", "got 0 bytes of another kind"),
        (f"data:image/png;base64,{GOOD[:-3]}", "base64 is broken"),
        (f"data:image/png;base64,{GOOD[: len(GOOD) // 8 * 4]}", "broken or cut short"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), "of another kind"),
        ("data:image/png;base64," + base64.b64encode(png_of(50_000, 50_000)).decode(), "cannot read image 1: .* exceeds"),
        ("data:image/png;base64," + base64.b64encode(png_of(7_000, 7_000)).decode(), "expected at most 32,000,000 pixels"),
        ("data:image/png;base64," + base64.b64encode(png_of(8, 8, TEXT_BOMB)).decode(), "cannot read image 1: .*too large"),
        ("ftp://example.com/a.png", "expected a data URI"),
    ],
)  # fmt: skip
def test_images_that_are_none(url, uri, words):
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "what?"}]
    answer = httpx.post(url + CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert re.search(words, error_of(answer)["message"])


def test_a_wrong_type_of_a_good_image_is_no_error(url):
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{GOOD}"}},
        {"type": "text", "text": "what?"},
    ]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    assert httpx.post(url + CHAT, json=body, timeout=60).status_code == 200


# ---- forms


@pytest.mark.parametrize(
    ("content_type", "body", "words"),
    [
        ("multipart/form-data", b"", "Missing boundary"),
        ("multipart/form-data; boundary=", b"--x\r\n", "cannot be read"),
        ("multipart/form-data; boundary=x", b"--y\r\nhello", "cannot be read|no image"),
        ("multipart/form-data; boundary=x", b"--x\r\nA: b\r\n\r\na\r\n--x--\r\n", "cannot be read"),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 20_000 + b"\r\na\r\n--x--\r\n", "cannot be read"),
    ],
)  # fmt: skip
def test_forms_that_are_none(url, content_type, body, words):
    answer = httpx.post(url + EDIT, content=body, headers={"Content-Type": content_type})
    assert re.search(words, error_of(answer)["message"])


@pytest.mark.parametrize(
    ("fields", "files", "words"),
    [
        ({}, [("mask", b"a")], "masks are unknown"),
        ({}, [("image", b"")], "cannot read image 1"),
        ({}, [("image[]", b"a")] * 17, "cannot be read: Too many files"),
        ({"image": "a"}, [("image", b"a")], "got 'image' more than once"),
        ({f"a{i}": "b" for i in range(70)}, [("image", b"a")], "cannot be read: Too many fields"),
        ({"prompt": "a" * 2**20 * 2}, [("image", b"a")], "cannot be read: Part exceeded"),
        ({"n": "[" * 100_000}, [("image", b"a")], "expected a whole number"),
        ({"n": "true"}, [("image", b"a")], "got n 'true': expected a whole number"),
        ({"n": "null"}, [("image", b"a")], "expected a whole number"),
        ({"seed": "NaN"}, [("image", b"a")], "expected a whole number"),
        ({"stream": "maybe"}, [("image", b"a")], "expected true or false"),
    ],
)
def test_wrong_fields_of_forms(url, fields, files, words):
    named = [(name, ("a.png", data)) for name, data in files]
    answer = httpx.post(url + EDIT, data={"prompt": "a"} | fields, files=named)
    assert words in error_of(answer)["message"]


# ---- below the application


def connect(url: str, data: bytes = b"") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=10)
    sock.sendall(data)
    return sock


def answer_to(url: str, data: bytes) -> tuple[int, dict]:
    """Status and error of the answer to these bytes, whose connection the server ends."""
    with closing(connect(url, data)) as sock:
        got = b""
        while (piece := sock.recv(65536)) and not got.endswith(b"}}"):
            got += piece
    head, body = got.split(b"\r\n\r\n", 1)
    return int(head.split()[1]), json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])["error"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00" * 10,
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 20_000,
        b"GET /" + b"a" * 20_000,
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["tls", "no host", "long header", "long path", "negative length", "bad chunk"],
)
def test_what_is_no_http_is_answered(url, data):
    status, error = answer_to(url, data)
    assert status == 400 and error["code"] == "invalid_http" and "expected a request" in error["message"]


def test_a_head_that_does_not_come_ends_its_connection(url):
    begin = time.monotonic()
    status, error = answer_to(url, b"GET /health HTTP/1.1\r\nX: ")
    assert (status, error["code"]) == (408, "slow_head") and time.monotonic() - begin < 5
    with closing(connect(url)) as sock:
        assert sock.recv(100) == b"", "one that sent nothing gets nothing"


def test_connections_are_counted(url):
    time.sleep(0.1)
    socks = [connect(url) for _ in range(LIMITS.max_connections)]
    try:
        answer = httpx.get(f"{url}/health")
        assert error_of(answer, 503)["code"] == "too_many_connections" and answer.headers["Retry-After"] == "1"
    finally:
        for sock in socks:
            sock.close()
    time.sleep(0.1)
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_client_that_goes_in_its_body_is_no_error(url, caplog):
    head = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {}\r\nContent-Length: 1000\r\n\r\n--x\r\n"
    with caplog.at_level(logging.ERROR, "uvicorn.error"):
        for path, kind in ((DRAW, "application/json"), (EDIT, "multipart/form-data; boundary=x")):
            connect(url, head.format(path, kind).encode()).close()
        time.sleep(0.2)
    assert not caplog.records


def test_a_client_that_does_not_read_is_cut_off():
    """Its request is cancelled, and its connection ends."""
    ticket = Ticket(model="m", n=1, timeout_s=60)

    async def endless():
        while True:
            await asyncio.sleep(0)  # as every event of a ticket is waited for
            yield bytes(2**16)

    @asynccontextmanager
    async def no_life(app):
        yield

    app = Starlette(lifespan=no_life)
    app.add_route("/", lambda request: EventStreamResponse(ticket, endless()))
    with listening(app, LIMITS) as url, closing(connect(url, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")):
        end = time.monotonic() + 20
        while not ticket.is_cancelled and time.monotonic() < end:
            time.sleep(0.02)
        assert ticket.is_cancelled


def test_an_error_that_nobody_foresaw_has_openais_shape(url, monkeypatch, caplog):
    monkeypatch.setattr(Engine, "submit", partial(fail, UnforeseenError("secret")))
    with caplog.at_level(logging.ERROR):
        error = error_of(httpx.post(url + DRAW, json={"prompt": "a"}), 500)
    assert error["code"] == "internal_error" and "secret" not in error["message"]
    assert "secret" in caplog.text, "the reason is in the log"


class UnforeseenError(Exception):
    """Of no kind that is expected."""


def fail(error: Exception, *args, **options):
    raise error
