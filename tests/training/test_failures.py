"""Runs that fail, in processes of their own: the last checkpoint is whole, the error says what to do, --resume does it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.failing_task import recipe_text
from helpers.paths import TESTS
from helpers.trainer_toy import assert_same_files

from unimm.training.checkpoints import check_undamaged, list_checkpoints
from unimm.training.config import read_recipe
from unimm.training.failures import explain_failures
from unimm.training.tasks.base import build_task
from unimm.training.trainer import train

# how a run of eight steps that saves at the fourth fails, with what `unimm train` ends its last line
FAILURES = {
    "loss": r"the loss is nan at step 6 (.*near.*nan.*): lower lr or max_grad_norm and resume the last checkpoint: ",
    "worker": "a process that makes batches is gone (DataLoader worker (pid",
    "disk": "model.safetensors: File too large: free some of the disk, or raise its limit; ",
}


def unimm_train(recipe: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    # a thread as in the tests' own process: sums of two are others in the last bit
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "unimm", "train", str(recipe), str(out), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(recipe_text("none", 0, folder))
    recipe = read_recipe(folder / "recipe.yaml")
    train(build_task(recipe), recipe, folder / "run", workers=0)
    return folder / "run"


@pytest.mark.parametrize("how", sorted(FAILURES))
def test_the_last_checkpoint_is_whole_and_the_error_says_how_to_go_on(tmp_path, whole, how):
    recipe = tmp_path / "recipe.yaml"
    out = tmp_path / "run"
    recipe.write_text(recipe_text(how, 6, out))
    workers = "2" if how == "worker" else "0"
    done = unimm_train(recipe, out, "--workers", workers)
    last = " ".join(done.stderr.split("error: ")[-1].split())
    assert done.returncode == 2, done.stderr
    kept = out / "checkpoints" / "00000004"
    assert last.endswith(f"{kept} is whole: --resume goes on from it"), done.stderr
    assert "Traceback" not in done.stderr
    for part in FAILURES[how].split(".*"):
        assert part in last
    assert list_checkpoints(out) == [kept]
    check_undamaged(kept)
    assert not list(out.rglob(".*")), "nothing half written is left"
    # what it advises
    recipe.write_text(recipe_text("none", 0, out))
    numbers = read_recipe(recipe)
    assert train(build_task(numbers), numbers, out, workers=0, resume=True) == 8
    assert_same_files(*(run / "checkpoints/00000008/model.safetensors" for run in (out, whole)))


def test_a_run_without_a_checkpoint_is_started_again(tmp_path):
    message = f"nan: {tmp_path} holds no checkpoint yet: start the run again"
    with pytest.raises(FloatingPointError, match=message), explain_failures(tmp_path):
        raise FloatingPointError("the loss is nan")


@pytest.mark.parametrize(
    "error",
    [ValueError("no such task"), RuntimeError("shapes disagree"), FileNotFoundError(errno.ENOENT, "No such file", "a")],
)
def test_other_errors_are_left_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as found, explain_failures(tmp_path):
        raise error
    assert found.value is error
