"""benchmarks/gpu.py at tiny sizes on a CPU: its parts, and what it says of those that fail or have no time."""

import json
import subprocess
import sys

import pytest
from helpers.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(out, *options):
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(out), *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return ran.stdout, {part["part"]: part for part in json.loads((out / "gpu.json").read_text())["parts"]}


@pytest.mark.slow
def test_kernels_are_compared_with_float64(tmp_path):
    shown, parts = run(tmp_path, "--parts", "kernels")
    kernels = parts["kernels"]
    assert kernels["state"] == "done" and "kernels: done" in shown
    rows = kernels["tables"][0]["rows"]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"} and all(row["right"] for row in rows)
    assert {row["case"].split(",")[0] for row in rows} == {"packed", "causal", "decoding"}


@pytest.mark.nightly
def test_every_part_runs(tmp_path):
    _, parts = run(tmp_path)
    assert all(part["state"] == "done" or "not installed" in part["state"] for part in parts.values()), parts
    assert all(part["tables"] for part in parts.values() if part["state"] == "done")


def test_a_part_without_time_says_so(tmp_path):
    _, parts = run(tmp_path, "--parts", "kernels", "ops", "--budget", "1.5")
    assert parts["kernels"]["state"].startswith("stopped after") and "no time" in parts["ops"]["state"]
