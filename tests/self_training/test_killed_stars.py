"""`unimm stars`, killed with kill -9 at random moments and started again: the same scores and weights, bit for bit."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unimm.self_training.config import STARS_RECIPES, read_stars_recipe
from unimm.self_training.run import run_stars

SETTINGS = (
    "levels=[math1,mapping1]",
    "questions=6",
    "verifier=none",
    "sampling={batch_size: 2, steps: 2}",
    "evaluation={levels: [math1], n: 4, seed: 1}",
    "train.steps=4",
    "train.batch_size=2",
    "train.save_every=1",
    "train.log_every=1",
    "train.options.timesteps_per_image=1",
)


def run_in_process(out: str) -> None:
    torch.set_num_threads(1)
    recipe = read_stars_recipe(STARS_RECIPES / "stars-nano.yaml", settings=SETTINGS)
    run_stars(recipe, Path(out), workers=0, progress=False)


def start(out: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=run_in_process, args=(str(out),))
    process.start()
    return process


def n_files(out: Path) -> int:
    # folders come and go while they are walked
    return sum(len(names) for _, _, names in os.walk(out))


@pytest.mark.nightly
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path):
    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    n_all = n_files(tmp_path / "whole")
    rng = random.Random(0)
    n_kills = 0
    while True:
        process = start(tmp_path / "run")
        aim = n_files(tmp_path / "run") + rng.randint(1, n_all // 5)
        while process.is_alive() and n_files(tmp_path / "run") < aim:
            time.sleep(0.005)
        time.sleep(0.3 * rng.random())
        if not process.is_alive():
            break
        process.kill()
        process.join()
        n_kills += 1
        assert n_kills < 50
    process.join()
    assert process.exitcode == 0 and n_kills >= 3
    ours, theirs = ((tmp_path / name / "result.json").read_text() for name in ("run", "whole"))
    assert ours == theirs
    last = "round2-mapping1/training/release/ema.safetensors"
    ours, theirs = (load_file(tmp_path / name / last) for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
