"""Lines of a training's log: an error that a signal handler raises while one is written is not lost."""

import logging

import pytest
from rich.console import Console

from unimm.cli.train import log_to_stderr


def fail_to_print(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Console, "print", fail)


def test_a_dead_worker_is_reported_by_the_training_and_not_by_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # torch's handler of SIGCHLD raises this in the main process, whatever that is doing
    fail_to_print(monkeypatch, RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."))
    with pytest.raises(RuntimeError, match="DataLoader worker"), log_to_stderr("unimm.lines", level=logging.INFO):
        logging.getLogger("unimm.lines").info("step 1")
    assert "Traceback" not in capsys.readouterr().err


def test_other_errors_of_a_line_do_not_end_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_to_print(monkeypatch, ValueError("no place for a line"))
    with log_to_stderr("unimm.lines", level=logging.INFO):
        logging.getLogger("unimm.lines").info("step 1")
    assert "no place for a line" in capsys.readouterr().err
