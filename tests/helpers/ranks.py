"""Several processes of a run, on this machine: what each made of some jobs."""

import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

from helpers.paths import TESTS


def run_processes(folder: Path, jobs: list, *, n: int = 2, codes: tuple[int, ...] = (0, 0)) -> list[dict]:
    """What each of n processes made of some jobs (name, job, arguments), by their names, as torchrun would start
    them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.pickle").write_bytes(pickle.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "TORCHELASTIC_RUN_ID": "test"}
    code = TESTS / "helpers" / "rank_jobs.py"
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error::UserWarning", str(code), str(folder), str(n)]
    process = subprocess.Popen(command, env=os.environ | common | {"PYTHONPATH": path}, start_new_session=True)
    try:
        assert process.wait(timeout=900) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its forks, too
            process.wait()
    assert tuple(pickle.loads((folder / "codes.pickle").read_bytes())) == codes  # noqa: S301, of our own processes
    paths = [folder / f"results{rank}.pickle" for rank in range(n)]
    return [pickle.loads(path.read_bytes()) for path in paths]  # noqa: S301
