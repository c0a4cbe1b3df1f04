"""Attention's Triton kernels, interpreted: the cases of attention_triton_cases.py in a child process."""

import re

import pytest
from helpers.paths import TESTS
from helpers.triton_harness import run_cases

pytest.importorskip("triton")

CASES = TESTS / "kernels" / "attention_triton_cases.py"


def test_interpreted():
    """Whether kernels interpret is settled when their module is imported: all cases share one child."""
    ran = run_cases(str(CASES), "-rA")
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert len(re.findall(r"^PASSED ", ran.stdout, re.MULTILINE)) >= 20, ran.stdout
    assert " skipped" not in ran.stdout.splitlines()[-1]
