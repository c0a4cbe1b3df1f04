"""What every speed script shares: a clock that can be trusted, the machine's own ceilings, tables, JSON and plots."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

SLOW = 5.0
# the environment variable that names a file to which every table is added, a line of JSON each
LOG = "UNIMM_BENCHMARK_LOG"


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the median, and where a fifth of the calls were faster or slower."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, ms: Sequence[float]) -> Times:
        """From single timings."""
        ordered = sorted(ms)
        fifth = len(ordered) // 5
        return cls(statistics.median(ordered), ordered[fifth], ordered[-1 - fifth])


def measure(call: Callable[[], Any], *, seconds: float = 1.0, least: int = 5, most: int = 200) -> Times:
    """Time calls one by one until `seconds` are over, after two that do not count; one of over SLOW seconds once, after
    one.

    On a GPU by its own events, with the cache in between overwritten; on a CPU by the clock.
    """
    gpu = torch.cuda.is_available()
    flush = torch.empty(128 * 2**20, dtype=torch.int8, device="cuda") if gpu else None
    start = time.perf_counter()
    call()
    if not gpu and time.perf_counter() - start > SLOW:
        least = most = 1
    else:
        call()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < least or (time.perf_counter() < until and len(found) < most):
        if flush is None:
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
            continue
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return Times.of(found)


def peak_megabytes(call: Callable[[], Any]) -> float | None:
    """The most GPU memory that a call holds beyond what was there, MB; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the figures were measured on, and its measured ceilings."""

    device: str
    threads: int
    torch: str
    triton: str | None
    python: str
    copy_gb_s: float
    matmul_tflop_s: float
    dtype: str

    @classmethod
    def here(cls, dtype: torch.dtype) -> Machine:
        """Measure a copy (read and write) and a square matrix product."""
        gpu = torch.cuda.is_available()
        device = torch.device("cuda" if gpu else "cpu")
        side, n = (8192, 2**28) if gpu else (1024, 2**25)
        source = torch.empty(n, dtype=torch.float32, device=device).normal_()
        target = torch.empty_like(source)
        copy = measure(lambda: target.copy_(source)).median
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = measure(lambda: a @ b).median
        return cls(
            device=torch.cuda.get_device_name() if gpu else processor(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            triton=triton_version(),
            python=platform.python_version(),
            copy_gb_s=2 * 4 * n / copy / 1e6,
            matmul_tflop_s=2 * side**3 / product / 1e9,
            dtype=str(dtype).removeprefix("torch."),
        )

    def __str__(self) -> str:
        return (
            f"{self.device}, {self.threads} threads, torch {self.torch}, triton {self.triton}, python {self.python}; "
            f"copy {self.copy_gb_s:.0f} GB/s, matmul {self.matmul_tflop_s:.2f} TFLOP/s in {self.dtype}"
        )


def processor() -> str:
    """The processor's name as Linux says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def triton_version() -> str | None:
    """triton's version, None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """|got - truth| / |truth|, both as float64 vectors; a NaN stays one."""
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def show(rows: Sequence[dict[str, Any]], *, title: str) -> None:
    """A table of rows on the terminal."""
    table = Table(title=title)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="right" if isinstance(rows[0].get(name), (int, float)) else "left")
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in names))
    Console(width=220).print(table)
    if log := os.environ.get(LOG):
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"title": title, "rows": list(rows)}, default=str) + "\n")


def cell(value: Any) -> str:
    """A number with three digits that count, nothing for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(path: Path, machine: Machine, rows: Sequence[dict[str, Any]]) -> None:
    """All figures as JSON, with the machine that they hold for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": asdict(machine), "rows": list(rows)}, indent=1) + "\n")
