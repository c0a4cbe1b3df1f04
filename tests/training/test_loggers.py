"""TensorBoard and Weights & Biases: the numbers and samples of a run, a resumed run, what is not installed."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from helpers.trainer_toy import RECIPE, Toy, log_of, run

from unimm.training import loggers
from unimm.training.loggers import TENSORBOARD_FOLDER, flat_numbers
from unimm.training.trainer import train

SHOWN = dataclasses.replace(RECIPE, loggers=("tensorboard",), sample_every=4)


def events(out):
    """What TensorBoard reads of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(out / TENSORBOARD_FOLDER))
    return found.Reload()


def test_tensorboard_shows_the_numbers_and_the_samples(tmp_path):
    run(tmp_path, recipe=SHOWN)
    found = events(tmp_path)
    lines = log_of(tmp_path)
    assert {"loss", "losses/near", "losses/small", "grad_norm", "lr", "samples_per_s", "memory_mb"} == set(
        found.Tags()["scalars"]
    )
    for name, values in (
        ("loss", [line["loss"] for line in lines]),
        ("losses/near", [x["losses"]["near"] for x in lines]),
    ):
        shown = found.Scalars(name)
        assert [one.step for one in shown] == list(range(1, 9))
        np.testing.assert_allclose([one.value for one in shown], values, rtol=1e-6)
    assert [(one.step, one.width, one.height) for one in found.Images("samples")] == [(4, 2, 2), (8, 2, 2)]


def test_a_resumed_run_replaces_what_it_takes_again(tmp_path):
    stopped = Toy(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if (child := os.fork()) == 0:  # dies in its sixth step, after the checkpoint of the fourth
        train(stopped, SHOWN, tmp_path, workers=0)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    time.sleep(1.1)  # TensorBoard orders its files by the second they were begun in
    run(tmp_path, recipe=SHOWN, resume=True)
    assert [one.step for one in events(tmp_path).Scalars("loss")] == list(range(1, 9))


@pytest.mark.slow
def test_wandb_shows_the_numbers_and_a_resumed_run_goes_on_in_it(tmp_path):
    """Offline, in processes of its own, as wandb keeps one run a process."""
    pytest.importorskip("wandb")
    code = """
import dataclasses, sys
from pathlib import Path
from helpers.trainer_toy import RECIPE, run
steps, resume = int(sys.argv[2]), sys.argv[3] == "resume"
run(Path(sys.argv[1]), recipe=dataclasses.replace(RECIPE, steps=steps, loggers=("wandb",)), resume=resume)
"""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    out = tmp_path / "run"
    for steps, how in (("4", "new"), ("8", "resume")):
        subprocess.run([sys.executable, "-c", code, str(out), steps, how], env=environment, check=True, cwd=tmp_path)
    name = (out / "wandb_id.txt").read_text().strip()
    runs = sorted(path.name for path in (out / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(one.endswith(name) for one in runs)
    written = [b"".join(path.read_bytes() for path in (out / "wandb" / one).rglob("*.wandb")) for one in runs]
    assert all(b"losses/near" in one or b"near" in one for one in written)
    assert list((out / "wandb").rglob("samples_*.png")), "the samples"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_said_before_the_first_step(tmp_path, monkeypatch, name):
    for module in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"logger '{name}'.*not installed: pip install 'unimm\[{name}\]'"):
        run(tmp_path, recipe=dataclasses.replace(RECIPE, loggers=(name,)))
    assert not (tmp_path / "checkpoints").exists()


def test_numbers_of_sections_have_their_names_before_theirs():
    report = {"step": 3, "losses": {"draw": 1.0}, "validation": {"losses": {"draw": 2.0}}}
    assert dict(flat_numbers(report)) == {"step": 3, "losses/draw": 1.0, "validation/losses/draw": 2.0}


def test_loggers_are_closed_when_a_run_ends_by_an_error(tmp_path, monkeypatch):
    closed = []
    logger = types.SimpleNamespace(log_metrics=print, log_image=print, close=lambda: closed.append("tensorboard"))
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda out, recipe, after: logger)

    def fail():
        raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        run(tmp_path, recipe=SHOWN, toy=Toy(2, fail))
    assert closed == ["tensorboard"]
