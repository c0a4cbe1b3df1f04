"""A local server that speaks as much of OpenAI's protocol as a judge needs, and fails as it is told to."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from PIL import Image

# of a request's body: the text of a reply, or a status, or bytes that are no reply
Reply = Callable[[dict[str, Any]], "str | int | bytes"]


class ChatServer:
    """What the server was asked, in order, and how many requests it held at once."""

    def __init__(self, reply: Reply, models: tuple[str, ...]) -> None:
        self.reply, self.models = reply, models
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.now = self.most = 0
        self.url = ""


def texts(body: dict[str, Any]) -> str:
    """The user's text in a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "\n".join(one["text"] for one in content if one["type"] == "text")


def pictures(body: dict[str, Any]) -> list[Image.Image]:
    """The images in a request."""
    content = body["messages"][-1]["content"]
    urls = [one["image_url"]["url"] for one in content if one["type"] == "image_url"] if content != str(content) else []
    return [Image.open(BytesIO(base64.b64decode(url.split(",", 1)[1]))) for url in urls]


@contextmanager
def chat_server(reply: Reply, *, models: tuple[str, ...] = ("judge",)) -> Iterator[ChatServer]:
    """A server on a port of its own."""
    server = ChatServer(reply, models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

        def send(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in server.models]
            self.send(200, json.dumps({"object": "list", "data": models}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.asked.append(body)
                server.now += 1
                server.most = max(server.most, server.now)
            said = server.reply(body)
            with server.lock:
                server.now -= 1
            if isinstance(said, int):
                self.send(said, json.dumps({"error": {"message": f"status {said}"}}).encode())
            elif isinstance(said, bytes):
                self.send(200, said, "text/html")
            else:
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                completion = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "judge",
                    "choices": [choice],
                }
                self.send(200, json.dumps(completion).encode())

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
