"""A real server, on a free port, in a thread of the tests' process; and the real client of OpenAI."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

openai = pytest.importorskip("openai", reason="needs the extra test")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")


def serving(engine, **options):
    """The address of an application over an engine."""
    from unimm.serving.app import create_app

    return listening(create_app(engine, **options), engine.limits)


@contextmanager
def listening(app, limits) -> Iterator[str]:
    """The address of an application, served as `unimm serve` serves it."""
    from unimm.serving.server import listen, uvicorn_config

    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn_config(app, limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert server.started
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        sock.close()


@pytest.fixture(scope="module")
def address(nano) -> Iterator[str]:
    """A server of bagel-nano."""
    from unimm.serving.engine import Engine

    with serving(Engine({"bagel-nano": nano})) as url:
        yield url


@pytest.fixture
def client(address):
    """OpenAI's client, as anyone uses it."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as one:
        yield one
