"""Runs of `unimm train` that are killed with kill -9 at random moments: python -m helpers.killing RECIPE FOLDER N_KILLS.

Each is a process forked from this one, which has imported all that it needs and computed nothing.
"""

import json
import multiprocessing
import random
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from torch import equal


class Fork:
    """The command in a process that is forked."""

    def __init__(self, *arguments):
        self.process = multiprocessing.get_context("fork").Process(target=command, args=(arguments,))
        self.process.start()

    def is_alive(self):
        return self.process.is_alive()

    def kill(self):
        self.process.kill()

    def wait(self):
        self.process.join()
        return self.process.exitcode


class Program:
    """The command as a user starts it."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen([sys.executable, "-m", "unimm", *arguments])

    def is_alive(self):
        return self.process.poll() is None

    def kill(self):
        self.process.kill()

    def wait(self):
        return self.process.wait()


def command(arguments):
    from unimm.cli.main import app

    app(list(arguments))


def run_killed(recipe, folder, *, n_kills, start):
    """Runs that are killed until they were so often, each then ended with some number of workers, and one that was not
    killed. Returns the steps that were logged where they were killed. Raises AssertionError where two differ."""
    rng = random.Random(n_kills)
    whole = Path(folder) / "whole"
    finish(start(*arguments(recipe, whole, 0)))
    killed_at = []
    run = 0
    while len(killed_at) < n_kills:
        out = Path(folder) / str(run)
        # a run is killed again and again until it comes to its end
        while len(killed_at) < n_kills:
            if not kill_at_a_random_moment(start(*arguments(recipe, out, rng.choice((0, 1, 2)))), out, rng):
                break
            killed_at.append(n_logged(out))
        finish(start(*arguments(recipe, out, rng.choice((0, 1, 2)))))
        assert_same_end(out, whole)
        run += 1
    return killed_at


def arguments(recipe, out, workers):
    """Those of the command; it goes on where there is a checkpoint."""
    resume = ["--resume"] if any((out / "checkpoints").glob("[0-9]*/state.pt")) else []
    return "train", str(recipe), str(out), "--workers", str(workers), *resume


def finish(process):
    assert process.wait() == 0


def n_logged(out):
    path = out / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_at_a_random_moment(process, out, rng):
    """Kill after some more steps and a part of one, or of a checkpoint; whether it was still running."""
    aim = n_logged(out) + rng.randint(0, 6)
    while process.is_alive() and n_logged(out) < aim:
        time.sleep(0.005)
    time.sleep(rng.random() * 0.1)
    process.kill()
    return process.wait() != 0


def logged(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["losses"], line["rows"]) for line in lines]


def assert_same_end(out, whole):
    for name in ("model", "average"):
        ours, theirs = (load_file(max((one / "checkpoints").iterdir()) / f"{name}.safetensors") for one in (out, whole))
        assert ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours), name
    assert logged(out) == logged(whole)


if __name__ == "__main__":
    import unimm.cli.main
    import unimm.training.tasks.bagel_records
    import unimm.training.trainer  # noqa: F401

    killed_at = run_killed(Path(sys.argv[1]), Path(sys.argv[2]), n_kills=int(sys.argv[3]), start=Fork)
    sys.stdout.write(json.dumps(killed_at) + "\n")
