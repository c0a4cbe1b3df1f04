"""A server as processes: one that listens and watches, and one that works and is begun anew should it die."""

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import uvicorn
from fastapi import FastAPI
from tqdm import tqdm
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from unimm.models.load_options import LoadOptions
from unimm.serving.app import create_app
from unimm.serving.connection import BoundedConnection
from unimm.serving.engine import Engine
from unimm.serving.guard import LOOPBACK_NAMES, AccessRules
from unimm.serving.limits import ServingLimits
from unimm.serving.remote_images import RemoteImages

HEALTH_TIMEOUT_S = 60  # a worker that has started and then does not answer for so long is killed and begun anew
LEAST_KEY_CHARS = 16


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """What a worker makes its application of; called in the worker's process."""

    models: tuple[str, ...]
    load: LoadOptions = field(default_factory=LoadOptions)
    threads: int | None = None
    allow_remote_images: bool = False
    limits: ServingLimits = field(default_factory=ServingLimits)
    rules: AccessRules = field(default_factory=AccessRules)

    def __call__(self) -> FastAPI:
        """Load the models and make the application."""
        end_with_parent()
        # of one process: tqdm's own lock is a semaphore, which a process that a signal ends would leave behind
        tqdm.set_lock(threading.RLock())
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        models = {served_name(name): self.load.load(name) for name in self.models}
        remote = RemoteImages() if self.allow_remote_images else None
        return create_app(Engine(models, limits=self.limits), rules=self.rules, remote=remote)


def end_with_parent() -> None:
    """Have this process drain and end, should the one that started it die: nobody would begin it anew, or stop it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="unimm-parent-watch", daemon=True).start()


def served_name(name: str) -> str:
    """The name that clients ask for a model by: itself, or a folder's last part."""
    return Path(name).resolve().name if Path(name).expanduser().is_dir() else name


def uvicorn_config(
    app: Any, limits: ServingLimits, *, factory: bool = False, log_level: str = "warning"
) -> uvicorn.Config:
    """How uvicorn serves an application under these limits."""
    return uvicorn.Config(
        app,
        factory=factory,
        http=cast(Any, partial(BoundedConnection, limits=limits)),
        ws="none",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.drain_s),
        timeout_worker_healthcheck=HEALTH_TIMEOUT_S,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        access_log=False,
        log_level=log_level,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address; port 0 takes a free one. Raises OSError where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.set_inheritable(True)
    return sock


class Supervisor(Multiprocess):
    """Begins a worker anew should it die, or hang. A start takes as long as its imports and models do: a worker is asked
    whether it hangs once it has answered for the first time."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]):
        super().__init__(config, sockets)
        self._asked: set[int | None] = set()
        self._answered: set[int | None] = set()

    def keep_subprocess_alive(self) -> None:
        """Look after the workers."""
        if all(self._has_answered(process) for process in self.processes):
            super().keep_subprocess_alive()

    def _has_answered(self, process: Process) -> bool:
        """Whether a worker has ever answered, or is dead."""
        if process.pid in self._answered or not process.process.is_alive():
            return True
        try:
            if process.pid not in self._asked:
                process.parent_conn.send(b"ping")
                self._asked.add(process.pid)
            if not process.parent_conn.poll(0):
                return False
            process.parent_conn.recv()
        except (OSError, EOFError):
            return True  # it has just died
        self._answered.add(process.pid)
        return True


def run_server(plan: ServerPlan, sock: socket.socket) -> None:
    """Serve on a socket until told to stop: SIGTERM and SIGINT drain, a worker that dies is reported and begun anew."""
    # at this level it says that a worker died
    config = uvicorn_config(plan, plan.limits, factory=True, log_level="info")
    config.workers = 1
    config.configure_logging()
    Supervisor(config, [sock]).run()


def parse_access(
    host: str, *, api_keys: str | None = None, key_file: Path | None = None, no_auth: bool = False
) -> AccessRules:
    """Who may ask a server on this host. Raises ValueError for one that everybody on the network could use unasked.

    api_keys: separated by commas. key_file: one a line. Those of both are known.
    """
    keys: tuple[str, ...] = ()
    if api_keys:
        keys += parse_keys(api_keys.split(","), place="--api-keys")
    if key_file:
        keys += parse_keys(key_file.read_text().splitlines(), place=str(key_file))
    is_loopback = host in {"localhost", "::1"} or host.startswith("127.")
    if not (is_loopback or keys or no_auth):
        raise ValueError(
            f"got --host {host} without keys: anybody who reaches it could use it; give --api-key-file or "
            "--api-keys, or --no-auth where that is meant"
        )
    return AccessRules(api_keys=keys, hosts=LOOPBACK_NAMES if is_loopback and not keys else ())


def parse_keys(texts: Sequence[str], *, place: str) -> tuple[str, ...]:
    """API keys without the space around them. Raises ValueError for none, and for one that could be guessed."""
    keys = tuple(text.strip() for text in texts if text.strip())
    if not keys or min(map(len, keys)) < LEAST_KEY_CHARS:
        raise ValueError(f"got {len(keys)} keys in {place}: expected some, each of at least {LEAST_KEY_CHARS} letters")
    return keys
