"""What a server does not do: answer without a key or under another name, read files, reach into its network, wait for
ever; and its processes: killed, begun anew, told to stop."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest
from conftest import serving
from starlette.requests import Request
from test_http import png

from unimm.serving.app import client_of
from unimm.serving.engine import Engine
from unimm.serving.guard import AccessRules
from unimm.serving.limits import ServingLimits
from unimm.serving.remote_images import RemoteImages, is_public
from unimm.serving.server import parse_access

KEY = "a-key-of-many-letters"
LIMITS = ServingLimits(
    max_body_bytes=20_000,
    max_input_pixels=10_000,
    read_timeout_s=0.5,
    write_timeout_s=1.0,
    max_running=1,
    max_waiting=1,
)


@pytest.fixture(scope="module")
def guarded(nano):
    """A server with a key and small limits."""
    with serving(Engine({"bagel-nano": nano}, limits=LIMITS), rules=AccessRules(api_keys=(KEY,), hosts=())) as url:
        yield url


def ask(url: str, **options) -> httpx.Response:
    body = {"prompt": "a", "steps": 1} | options
    return httpx.post(f"{url}/v1/images/generations", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)


def test_keys(guarded):
    assert httpx.get(f"{guarded}/health").status_code == 200
    for key in ("", "wrong", KEY + "x", KEY[:-1]):
        client = openai.OpenAI(base_url=f"{guarded}/v1", api_key=key or "-", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError, match="API key"):
            client.models.list()
    assert httpx.get(f"{guarded}/metrics").status_code == 401
    with openai.OpenAI(base_url=f"{guarded}/v1", api_key=KEY) as client:
        assert client.models.list().data[0].id == "bagel-nano"


def test_other_names_of_a_loopback_address_are_refused(address):
    """A page on the internet may send a browser to this address under its own name."""
    for host, status in (("localhost", 200), ("127.0.0.1:80", 200), ("evil.example", 421), ("", 421)):
        assert httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code == status, host


def test_bodies_are_bounded(guarded, nano):
    assert ask(guarded, prompt="a" * 30_000).status_code == 413

    def chunks():
        yield from [b" " * 1000] * 30

    answer = httpx.post(
        f"{guarded}/v1/images/generations",
        content=chunks(),
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    big = nano.generate("a", steps=1, seed=0).image.resize((200, 100))
    files = {"image": ("a.png", png(big.quantize(4)), "image/png")}
    answer = httpx.post(
        f"{guarded}/v1/images/edits", data={"prompt": "a"}, files=files, headers={"Authorization": f"Bearer {KEY}"}
    )
    assert answer.status_code == 400 and "at most 10,000 pixels" in answer.json()["error"]["message"]


def test_a_slow_body_is_given_up(guarded):
    host, port = guarded.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(
            f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{".encode()
        )
        assert b" 408 " in sock.recv(4096)


def test_a_full_queue_is_429_and_a_late_request_504(guarded):
    with httpx.stream(
        "POST",
        f"{guarded}/v1/images/generations",
        json={"prompt": "a", "steps": 200, "stream": True, "partial_images": 8},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    ) as running:
        next(running.iter_lines())
        # of so many steps that no machine is done in time
        late = ask(guarded, steps=200, timeout=0.05)
        assert late.status_code == 504 and late.json()["error"]["type"] == "timeout_error"
        answer = ask(guarded, n=2)
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
    # its client has gone: the place is free at once
    assert ask(guarded).status_code == 200
    assert httpx.get(f"{guarded}/health").json()["running"] == 0


def test_a_client_that_goes_is_noticed_without_streaming(guarded):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{guarded}/v1/images/generations", json={"prompt": "a", "steps": 250},
            headers={"Authorization": f"Bearer {KEY}"}, timeout=0.3,
        )  # fmt: skip
    assert ask(guarded).status_code == 200
    text = httpx.get(f"{guarded}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert float(re.search(r'unimm_answers_total\{end="RequestCancelledError"\} (\S+)', text)[1]) >= 1


def test_a_network_is_not_served_without_keys(tmp_path):
    with pytest.raises(ValueError, match="--api-key-file"):
        parse_access("0.0.0.0")
    (tmp_path / "keys").write_text("short\n")
    with pytest.raises(ValueError, match="at least 16"):
        parse_access("127.0.0.1", key_file=tmp_path / "keys")
    with pytest.raises(ValueError, match="got 2 keys in --api-keys: expected some, each of at least 16"):
        parse_access("127.0.0.1", api_keys=f"{KEY},short")
    (tmp_path / "keys").write_text(f"{KEY}\n\nanother-key-of-letters\n")
    rules = parse_access("0.0.0.0", api_keys="a-key-of-the-environment, ", key_file=tmp_path / "keys")
    assert rules.api_keys == ("a-key-of-the-environment", KEY, "another-key-of-letters")
    assert rules.is_key("another-key-of-letters") and not rules.is_key("") and rules.hosts == ()
    assert parse_access("localhost").hosts


def test_a_key_that_nobody_checked_takes_no_turn_of_its_own():
    """Who makes up many would wait for less than the others."""
    asked = [
        Request({"type": "http", "headers": [(b"authorization", key)], "client": ("10.0.0.1", port)})
        for key, port in ((b"Bearer a", 1), (b"Bearer b", 2))
    ]
    assert len({client_of(one, has_keys=False) for one in asked}) == 1
    assert len({client_of(one, has_keys=True) for one in asked}) == 2


# ---- remote images


def test_only_public_addresses():
    private = (
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "2002:0a00:0001::", "64:ff9b::a00:1", "255.255.255.255",
    )  # fmt: skip
    assert not [one for one in private if is_public(one)]
    assert is_public("93.184.215.14") and is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")


class Remote(BaseHTTPRequestHandler):
    """Answers by the path: a picture, a redirect, much, slowly."""

    def do_GET(self):
        if self.path == "/picture":
            return self.answer(200, b"picture")
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return None
        if self.path == "/much":
            return self.answer(200, b"x" * 3000)
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b"x")
                time.sleep(0.1)
            return None
        return self.answer(404, b"")

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_remote_images_are_bounded_and_public_on_every_redirect():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Remote)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = {
        "good.example": ["93.184.215.14"],
        "inside.example": ["10.0.0.1"],
        "mixed.example": ["93.184.215.14", "::1"],
    }
    connected = []

    def connect(address, port, host, timeout):
        connected.append((address, port, host))
        return socket.create_connection(server.server_address, timeout)

    images = RemoteImages(max_bytes=2000, timeout_s=1.0, resolve=lambda host, port: names[host], connect=connect)
    try:
        assert images.fetch("https://good.example/picture") == b"picture"
        assert images.fetch("https://good.example/to/https://good.example/to//picture") == b"picture"
        assert set(connected) == {("93.184.215.14", 443, "good.example")}
        for url, words in (
            ("http://good.example/picture", "expected https"),
            ("https://user@good.example/picture", "without a user name"),
            ("https://good.example:8443/picture", "port 443"),
            ("https://inside.example/picture", "public addresses"),
            ("https://mixed.example/picture", "public addresses"),
            ("https://good.example/to/https://inside.example/picture", "public addresses"),
            ("https://good.example/to/http://good.example/picture", "expected https"),
            ("https://good.example/to/file:///etc/passwd", "expected https"),
            ("https://good.example/much", "more than 2,000 bytes"),
            ("https://good.example/slow", "did not come|timed out"),
            ("https://good.example/none", "status 404"),
            ("https://good.example/to//to//to//to//to//picture", "redirects"),
        ):
            with pytest.raises(ValueError, match=words):
                images.fetch(url)
        assert not [one for one in connected if one[2] != "good.example"]
    finally:
        server.shutdown()
        server.server_close()


# ---- processes


def health(url: str) -> dict | None:
    """What a server says of itself; None while it does not."""
    try:
        answer = httpx.get(f"{url}/health", timeout=5)
    except httpx.TransportError:
        return None
    return answer.json() if answer.status_code == 200 else None


def wait_healthy(url: str, seconds: float = 300) -> dict:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (said := health(url)) is not None:
            return said
        time.sleep(0.1)
    raise AssertionError("the server did not come up")


def workers_of(pid: int) -> list[int]:
    """The processes that a process started, but for the tracker of its semaphores."""
    lists = (task / "children" for task in Path(f"/proc/{pid}/task").iterdir())
    children = [int(child) for one in lists for child in one.read_text().split()]
    return [one for one in children if "resource_tracker" not in Path(f"/proc/{one}/cmdline").read_text()]


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are found in /proc")
def test_a_killed_worker_is_begun_anew_and_sigterm_drains():
    command = [sys.executable, "-m", "unimm", "serve", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = re.search(r"http://\S+(?=/v1)", process.stdout.readline())[0]
            assert wait_healthy(url)["models"] == ["bagel-nano"]
            (worker,) = workers_of(process.pid)
            os.kill(worker, signal.SIGKILL)
            # a client that tries again hears nothing of it
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=60, timeout=300) as client:
                answer = client.images.generate(model="bagel-nano", prompt="a red circle", extra_body={"steps": 2})
                assert answer.data[0].b64_json
                assert workers_of(process.pid) != [worker]
                # told to stop while it streams: what runs is finished
                stream = client.images.generate(
                    model="bagel-nano", prompt="a", stream=True, partial_images=3, extra_body={"steps": 24}
                )
                first = next(iter(stream))
                process.send_signal(signal.SIGTERM)
                events = [first, *stream]
            assert events[-1].type == "image_generation.completed"
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            assert "died" in errors, "what happened is said"
        finally:
            process.kill()


def test_the_command_refuses_what_it_cannot_serve():
    command = [sys.executable, "-m", "unimm", "serve", "--model", "bagel-nanoo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "bagel-nano" in done.stderr and json.dumps(done.stdout) == '""'
