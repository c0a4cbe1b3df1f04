"""How fast a run is: tokens, images and FLOPs a second, memory, and the part of the device's peak that the model uses.

MFU, model FLOPs utilisation, is the FLOPs that the model needs (unimm.nn.flops) over those that its devices could do in
the same time: Chowdhery et al. 2022, arXiv 2204.02311, section 4.1 and appendix B.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from unimm.distributed.ranks import Ranks
from unimm.training.tasks.base import TrainingTask

# of the square matrices whose product is timed, and how often: a tenth of a second on one core, and less on a GPU
PEAK_SIDES = {"cpu": 1024, "cuda": 8192}
PEAK_REPEATS = 4
MEGABYTE = 2**20
TERA = 10**12


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """What a batch holds: rows of the transformer that is trained, images, and FLOPs of the step, forward and
    backward."""

    tokens: int = 0
    images: int = 0
    flops: int = 0

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts(
            tokens=self.tokens + other.tokens, images=self.images + other.images, flops=self.flops + other.flops
        )


@runtime_checkable
class CountingTask(TrainingTask, Protocol):
    """A task that says how much there is in a batch."""

    def step_counts(self, batch: Any) -> StepCounts:
        """Tokens, images and FLOPs of a batch, as `losses` takes it."""


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOPs a second of a product of square matrices on a device: the fastest of a few, after one to warm up."""
    side = PEAK_SIDES.get(device.type, PEAK_SIDES["cuda"])
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    fastest = min(_timed_product(a, b) for _ in range(1 + PEAK_REPEATS))
    return 2 * side**3 / fastest


def _timed_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds of one product."""
    synchronize(a.device)
    start = time.perf_counter()
    a @ b
    synchronize(a.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for what a device was given to do; a CPU has done it already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that was held until now, in MiB: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEGABYTE
    # kibibytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE


class Throughput:
    """What was trained on since the last report, and the rates and the MFU that follow.

    peak_flops: FLOPs a second of one device; None until they are measured.
    """

    def __init__(
        self, task: TrainingTask, device: torch.device, dtype: torch.dtype, *, peak_flops: float | None
    ) -> None:
        # a task that counts nothing has no rates
        self.task = task if isinstance(task, CountingTask) else None
        self.device = device
        self.dtype = dtype
        self.peak_flops = peak_flops
        self.counts = StepCounts()

    def measure_peak(self) -> None:
        """Measure the device's peak where it is needed and was not given."""
        if self.task is not None and self.peak_flops is None:
            self.peak_flops = measure_peak_flops(self.device, self.dtype)

    def add(self, batch: Any) -> None:
        """Note a batch before it is trained on."""
        if self.task is not None:
            self.counts += self.task.step_counts(batch)

    def report(self, seconds: float, ranks: Ranks) -> dict[str, float]:
        """Rates of all ranks since the last report as a line of the log has them; memory alone, of this rank's device,
        for a task that counts nothing."""
        found: dict[str, float] = {}
        if self.task is not None:
            seconds = max(seconds, 1e-9)
            tokens, images, flops = (
                n / seconds for n in ranks.sum([self.counts.tokens, self.counts.images, self.counts.flops])
            )
            rates = {"tokens": tokens, "images": images}
            found = {f"{name}_per_s": round(rate, 2) for name, rate in rates.items()} | {"tflops": flops / TERA}
            found |= {"mfu": round(flops / (ranks.size * self.peak_flops), 4)} if self.peak_flops is not None else {}
        self.counts = StepCounts()
        return found | {"memory_mb": round(peak_memory_mb(self.device))}
