"""The load test in short: nothing lost, nothing wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"


@pytest.mark.nightly
def test_the_load_test_in_short():
    command = [sys.executable, SCRIPT, "all", "--short", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {one["part"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert parts.keys() == {"engine", "lone", "gain", "load"}
    assert parts["load"]["n_wrong_or_lost"] == 0 and parts["load"]["answers_compared"] > 0
    assert parts["gain"]["gain"] > 1 and parts["engine"]["most_levels_apart"] <= 1
