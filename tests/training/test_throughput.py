"""Rates, memory and MFU of a run: what a step holds over the time that training took, of the device's peak."""

import dataclasses
import json

import pytest
import torch
from helpers.trainer_toy import RECIPE, Toy, run

from unimm.training import trainer as loop
from unimm.training.logging import format_report
from unimm.training.throughput import StepCounts, Throughput, measure_peak_flops, peak_memory_mb
from unimm.training.trainer import Trainer

CPU = torch.device("cpu")


class CountingToy(Toy):
    """The toy, of whose batches each has so many tokens, images and FLOPs."""

    def step_counts(self, batch):
        return StepCounts(tokens=len(batch), images=2, flops=300)


def trainer_of(toy, **changes) -> Trainer:
    return Trainer(toy, dataclasses.replace(RECIPE, **changes), CPU)


def test_rates_and_mfu_are_of_the_time_that_training_took(monkeypatch):
    clock = iter((0.0, 100.0, 103.0, 110.0))
    # two batches a step
    trainer = trainer_of(CountingToy(), gradient_accumulation=2, peak_tflops=1e-9)
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    trainer.start_clock()
    trainer.update(trainer.task.batch(0), trainer.task.batch(1))
    with trainer.untimed():
        pass
    report = trainer.report()
    # of the 110 seconds three were not training's
    assert report["samples_per_s"] == pytest.approx(8 / 107, abs=0.01)
    assert report["tokens_per_s"] == pytest.approx(8 / 107, abs=0.01)
    assert report["images_per_s"] == pytest.approx(4 / 107, abs=0.01)
    assert report["tflops"] == pytest.approx(600 / 107 * 1e-12)
    assert report["mfu"] == pytest.approx(600 / 107 / 1000, abs=1e-4)
    assert trainer.throughput.counts == StepCounts()


def test_a_log_has_them_and_a_line_for_people_too(tmp_path):
    run(tmp_path, toy=CountingToy())
    for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()):
        assert line["tokens_per_s"] > 0 and line["tflops"] > 0 and line["mfu"] >= 0 and line["memory_mb"] > 50
        assert "tokens/s" in format_report(line) and "MFU" in format_report(line) and " MB" in format_report(line)


def test_a_task_that_counts_nothing_has_memory_alone(tmp_path):
    run(tmp_path)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert "mfu" not in line and "tokens_per_s" not in line and line["memory_mb"] > 50
    assert "MFU" not in format_report(line)


def test_the_peak_is_measured_in_the_runs_precision_unless_it_is_given():
    toy = CountingToy()
    given = Throughput(toy, CPU, torch.float32, peak_flops=5.0)
    given.measure_peak()
    assert given.peak_flops == 5.0
    measured = trainer_of(toy, precision="bfloat16").throughput
    assert measured.peak_flops is None and measured.dtype == torch.bfloat16
    measured.measure_peak()
    # a core does between a tenth of a GFLOP and a few TFLOP a second
    assert measured.peak_flops is not None and 1e8 < measured.peak_flops < 1e14


def test_the_peak_is_that_of_a_product():
    """A product of the same size takes the time that the peak says, but for the noise of a busy machine: either may have
    had a fraction of a core."""
    peak = measure_peak_flops(CPU, torch.float32)
    a = torch.randn(1024, 1024)
    times = []
    for _ in range(5):
        before = loop.time.perf_counter()
        a @ a
        times.append(loop.time.perf_counter() - before)
    assert 0.1 < 2 * 1024**3 / peak / min(times) < 10


def test_memory_is_at_least_what_is_held():
    held = torch.ones(2**26)
    assert held.sum() == 2**26 and peak_memory_mb(CPU) > 4 * 2**26 / 2**20
