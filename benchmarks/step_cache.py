"""What step caches cost in quality and spare in time: accuracy in the little world and PSNR, against forwards that ran.

    python benchmarks/step_cache.py [--model bagel-nano] [--n 60] [--tasks draw.one,draw.count] [--steps 24] [--json OUT]

All caches draw the same prompts from the same noise as the model without one; PSNR is against those images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from unimm.evaluation.benchmarks.shapes import BenchmarkScore, is_right, task_items
from unimm.evaluation.generating import produce
from unimm.evaluation.items import EvalItem
from unimm.generation.step_cache import StepCacheOptions, TaylorSeer, TaylorSeerState, TeaCache, TeaCacheState
from unimm.models.registry import load

CACHES: dict[str, StepCacheOptions | None] = {
    "none": None,
    "TaylorSeer(interval=2)": TaylorSeer(interval=2),
    "TaylorSeer(interval=2, order=1)": TaylorSeer(interval=2, order=1),
    "TaylorSeer()": TaylorSeer(),
    "TaylorSeer(order=1)": TaylorSeer(order=1),
    "TaylorSeer(interval=5, order=1)": TaylorSeer(interval=5, order=1),
    "TeaCache(threshold=0.05)": TeaCache(threshold=0.05),
    "TeaCache(threshold=0.1)": TeaCache(threshold=0.1),
    "TeaCache()": TeaCache(),
    "TeaCache(threshold=0.3)": TeaCache(threshold=0.3),
}


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """How many branches' outputs were asked of caches, and of how many the blocks ran."""
    counts = {"asked": 0, "ran": 0}

    def counted(kind: type) -> Any:
        plain = kind.due  # type: ignore[attr-defined]

        def due(self: Any, branches: Sequence, inputs: Any) -> list:
            found = plain(self, branches, inputs)
            counts["asked"] += len(branches)
            counts["ran"] += len(found)
            return found

        return patch.object(kind, "due", due)

    with counted(TaylorSeerState), counted(TeaCacheState):
        yield counts


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Decibels, of images of 0 to 255; 99 for equal ones."""
    mse = np.square(image.astype(float) - reference).mean()
    return 99.0 if mse == 0 else float(10 * np.log10(255**2 / mse))


def draw(model: Any, items: Sequence[EvalItem], options: dict[str, Any], *, batch: int) -> tuple[list, float]:
    """The outputs of all items, and the processor's seconds that they took."""
    began = time.process_time()
    outputs = [one for i in range(0, len(items), batch) for one in produce(model, items[i : i + batch], options)]
    return outputs, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bagel-nano")
    parser.add_argument("--n", type=int, default=60, help="images of each task")
    parser.add_argument("--tasks", default="draw.one,draw.count")
    parser.add_argument("--steps", type=int, help="the model's own number unless given")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--only", default="", help="caches whose name holds this; none is always drawn, to compare with"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model: Any = load(given.model, device=given.device)
    tasks = given.tasks.split(",")
    items = {task: task_items(task, given.n, seed=given.seed, split="test") for task in tasks}
    steps = {} if given.steps is None else {"steps": given.steps}
    rows = []
    plain: dict[str, list[np.ndarray]] = {}
    table = Table(
        "cache", "blocks run", "CPU s an image", *tasks, "PSNR dB", title=f"{given.model}, n = {given.n} a task"
    )
    for name, cache in CACHES.items():
        if given.only not in name and cache is not None:
            continue
        row: dict[str, Any] = {"cache": name, "tasks": {}}
        distances = []
        seconds = 0.0
        with counting() as counts:
            for task in tasks:
                options = {**steps, **({} if cache is None else {"step_cache": cache})}
                outputs, took = draw(model, items[task], options, batch=given.batch)
                seconds += took
                images = [np.asarray(one.image) for one in outputs]
                reference = plain.setdefault(task, images)
                distances += [psnr(*pair) for pair in zip(images, reference, strict=True)]
                n_right = sum(is_right(item, one) for item, one in zip(items[task], outputs, strict=True))
                row["tasks"][task] = vars(BenchmarkScore.from_counts(n_right, given.n))
        row["ran"] = counts["ran"] / counts["asked"] if counts["asked"] else 1.0
        row["psnr"] = None if cache is None else float(np.mean(distances))
        row["seconds"] = seconds / (given.n * len(tasks))
        rows.append(row)
        scores = [f"{one['accuracy']:.2f} ({one['low']:.2f}-{one['high']:.2f})" for one in row["tasks"].values()]
        shown = "-" if row["psnr"] is None else f"{row['psnr']:.1f}"
        table.add_row(name, f"{row['ran']:.2f}", f"{row['seconds']:.3f}", *scores, shown)
        if given.json:
            given.json.write_text(json.dumps({"model": given.model, "n": given.n, "rows": rows}, indent=1))
    Console().print(table)


if __name__ == "__main__":
    main()
