"""The processes that make batches end with the one that trains, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, time
from pathlib import Path

from unimm.training.batches import iterate_batches


class LargeBatches:
    def __call__(self, number):
        Path(sys.argv[1], str(os.getpid())).touch()
        return b"x" * 2**22  # more than a pipe holds: it is sent while somebody reads


if __name__ == "__main__":
    for batch in iterate_batches(LargeBatches(), range(1000), workers=2):
        Path(sys.argv[1], "main").touch()
        time.sleep(600)
"""


def wait_until(condition, *, seconds: float, what: str):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} not within {seconds} s"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended; one that has ended stays a zombie where nobody waits for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes in /proc")
def test_workers_end_with_a_main_process_that_was_killed(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    made = tmp_path / "made"
    made.mkdir()
    main = subprocess.Popen([sys.executable, tmp_path / "run.py", made])
    try:
        wait_until(lambda: len(list(made.iterdir())) == 3, seconds=120, what="a batch of each of two workers")
    finally:
        main.kill()
        main.wait()
    workers = [int(path.name) for path in made.iterdir() if path.name != "main"]
    try:
        wait_until(lambda: not any(map(is_running, workers)), seconds=30, what="the workers' end")
    finally:
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)
