"""`unimm train` on records, killed with kill -9 at random moments and resumed: the same final weights, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers.bagel_record_toys import recipe_numbers
from helpers.paths import TESTS
from safetensors.torch import load_file
from torch import equal

from examples.data import make


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """BAGEL's three formats in packs, a checkpoint every second step."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("data")
    names = ("bagel-t2i", "bagel-edit", "bagel-vlm")
    data = {name: getattr(make, f"make_{name.replace('-', '_')}")(folder) for name in names}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_numbers(data, steps=30)))
    return path


def start(recipe, out, *, workers):
    """The command, in a process of its own; it goes on where `out` has a checkpoint."""
    has_checkpoint = any((out / "checkpoints").glob("[0-9]*/state.pt"))
    path = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "unimm", "train", str(recipe), str(out), "--workers", str(workers)]
    return subprocess.Popen(
        command + (["--resume"] if has_checkpoint else []),
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def n_logged(out):
    path = out / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_at_a_random_moment(process, out, rng):
    """Wait for some more steps, and a part of one, then kill -9; whether it was still running."""
    aim = n_logged(out) + rng.randint(0, 8)
    deadline = time.monotonic() + 60
    while process.poll() is None and n_logged(out) < aim and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(rng.random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def logged(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["losses"], line["rows"]) for line in lines]


def assert_same_end(out, whole):
    for name in ("model", "average"):
        ours, theirs = (load_file(one / f"checkpoints/00000030/{name}.safetensors") for one in (out, whole))
        assert ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    assert logged(out) == logged(whole)


def run_killed(recipe, folder, *, n_kills, seed):
    """Runs that are killed until they were so often, and one that was not, with other numbers of workers."""
    rng = random.Random(seed)
    whole = folder / "whole"
    finish(start(recipe, whole, workers=0))
    done = 0
    run = 0
    while done < n_kills:
        out = folder / str(run)
        for _ in range(n_kills - done):
            if not kill_at_a_random_moment(start(recipe, out, workers=rng.choice((0, 1, 2))), out, rng):
                break
            done += 1
        finish(start(recipe, out, workers=rng.choice((0, 1, 2))))
        assert_same_end(out, whole)
        run += 1


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(recipe, tmp_path):
    run_killed(recipe, tmp_path, n_kills=2, seed=1)


@pytest.mark.nightly
def test_fifty_kills(recipe, tmp_path):
    run_killed(recipe, tmp_path, n_kills=50, seed=0)
