"""Checkpoints that a thread writes: the same as those that training waits for, and what goes wrong in the thread."""

import dataclasses
import os
import signal
import threading

import pytest
import torch
from helpers.trainer_toy import RECIPE, Toy, assert_same_files, log_of, run

from unimm.distributed.ranks import Ranks
from unimm.training import checkpoints
from unimm.training.background_saves import BackgroundSaves
from unimm.training.checkpoints import check_undamaged, list_checkpoints

ASYNC = dataclasses.replace(RECIPE, async_checkpoints=True, save_every=3)
FILES = ("model.safetensors", "average.safetensors", "optimizer.safetensors")


@pytest.fixture
def hold(monkeypatch):
    """Lets the thread that writes a checkpoint wait, before its last file, for an event; by step."""
    events = {}
    write = checkpoints._write_state

    def wait_and_write(folder, state, checksums):
        if state["step"] in events:
            assert events[state["step"]].wait(60)
        write(folder, state, checksums)

    monkeypatch.setattr(checkpoints, "_write_state", wait_and_write)
    return events


def test_a_run_is_the_one_that_waits(tmp_path):
    run(tmp_path / "waits", recipe=dataclasses.replace(RECIPE, save_every=3))
    run(tmp_path / "ours", recipe=ASYNC)
    assert log_of(tmp_path / "ours") == log_of(tmp_path / "waits")
    for step in ("00000006", "00000008"):
        ours, theirs = (tmp_path / name / "checkpoints" / step for name in ("ours", "waits"))
        check_undamaged(ours)
        for name in FILES:
            assert_same_files(ours / name, theirs / name)
    assert_same_files(*(tmp_path / name / "release/model.safetensors" for name in ("ours", "waits")))


def test_training_goes_on_meanwhile_with_values_of_its_own(tmp_path, hold):
    """The thread still writes the weights of step 3 when step 5 begins."""
    run(tmp_path / "waits", recipe=dataclasses.replace(RECIPE, steps=3, schedule="constant"))
    hold[3] = threading.Event()
    found = []

    def look():
        found.append(list_checkpoints(tmp_path / "ours"))
        hold[3].set()

    run(tmp_path / "ours", recipe=dataclasses.replace(ASYNC, steps=6, schedule="constant"), toy=Toy(5, look))
    assert found == [[]]
    ours, theirs = (tmp_path / name / "checkpoints/00000003" for name in ("ours", "waits"))
    for name in FILES:
        assert_same_files(ours / name, theirs / name)


def test_what_goes_wrong_in_the_thread_ends_the_run(tmp_path, monkeypatch):
    write = checkpoints._write_state

    def fail(folder, state, checksums):
        if state["step"] == 6:
            raise OSError(28, "No space left on device", str(folder / "state.pt"))
        write(folder, state, checksums)

    monkeypatch.setattr(checkpoints, "_write_state", fail)
    with pytest.raises(OSError, match="free some of the disk.*00000003 is whole: --resume goes on from it"):
        run(tmp_path, recipe=ASYNC)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["00000003"]
    monkeypatch.undo()
    _, step = run(tmp_path, recipe=ASYNC, resume=True)
    assert step == 8


def test_a_run_that_fails_waits_for_its_last_checkpoint(tmp_path, hold):
    """Which is whole when the error says which one is."""
    hold[6] = threading.Event()
    toy = Toy(
        7, lambda: (threading.Timer(0.2, hold[6].set).start(), torch.nn.init.constant_(toy.model[3].bias, torch.nan))
    )
    with pytest.raises(FloatingPointError, match="00000006 is whole"):
        run(tmp_path, recipe=ASYNC, toy=toy)
    check_undamaged(list_checkpoints(tmp_path)[-1])


def test_a_run_that_is_killed_meanwhile(tmp_path, hold):
    hold[6] = threading.Event()
    process = os.fork()
    if not process:
        run(tmp_path, recipe=ASYNC, toy=Toy(7, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert list((tmp_path / "checkpoints/00000006").glob(".*")), "it was being written"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["00000003"]
    hold.clear()
    _, step = run(tmp_path, recipe=ASYNC, resume=True)
    assert step == 8 and [path.name for path in list_checkpoints(tmp_path)] == ["00000006", "00000008"]


def test_one_at_a_time():
    saves = BackgroundSaves(Ranks())
    order = []
    event = threading.Event()
    saves.start(lambda ranks: event.wait(60) and order.append("first"))
    saves.check()
    assert not order
    threading.Timer(0.1, event.set).start()
    saves.start(lambda ranks: order.append("second"))
    saves.wait()
    assert order == ["first", "second"]
