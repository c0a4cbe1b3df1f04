"""`unimm train` on records, killed with kill -9 at random moments and resumed: the same final weights, bit for bit."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from helpers.bagel_record_toys import recipe_numbers
from helpers.killing import Program, run_killed
from helpers.paths import TESTS

from examples.data import make


@pytest.fixture
def recipe(tmp_path):
    """BAGEL's three formats in packs, a checkpoint every second step."""
    pytest.importorskip("pyarrow")
    names = ("bagel-t2i", "bagel-edit", "bagel-vlm")
    data = {name: getattr(make, f"make_{name.replace('-', '_')}")(tmp_path / "data") for name in names}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_numbers(data, steps=14)))
    return path


@pytest.fixture
def environment(monkeypatch):
    path = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_runs_that_are_killed_end_as_one_that_is_not(recipe, tmp_path, environment):
    arguments = [sys.executable, "-m", "helpers.killing", str(recipe), str(tmp_path), "3"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout.splitlines()[-1])) == 3


@pytest.mark.nightly
def test_fifty_kills(recipe, tmp_path, environment):
    run_killed(recipe, tmp_path, n_kills=50, start=Program)
