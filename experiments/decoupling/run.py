"""Janus's ablation of decoupled encoders (arXiv 2410.13848, table 5) at nano size: all experiments on one budget, in
one table.

    python -m experiments.decoupling OUT --minutes 15 --seeds 1 2 3
    python -m experiments.decoupling OUT --steps 6000 --seeds 1 2 3 --device cuda

Trains the experiments A, B, D, E and F of janus-nano-decoupling.yaml, and scores each on pairs of shape and colour that
no training held. The parts come from `unimm train` and lie where the recipe says. A seed makes the weights to begin
with, the batches, and the examples that are scored. A budget of minutes is fair only where nothing else runs beside.
Writes OUT/decoupling.json, .md and .png; a stopped command goes on, of a budget of steps also within a run, while a run
of minutes that was stopped begins anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.common import (
    Bar,
    describe_run,
    experiment_parser,
    kept_arms,
    markdown_table,
    over_seeds,
    plot_bars,
    right_by_task,
    run_command,
    seeded_rows,
    seeded_score,
    seeds_text,
    spent_seconds,
    write_results,
)
from experiments.decoupling.task import EXPERIMENTS
from unimm.training.checkpoints import list_checkpoints
from unimm.training.config import TrainConfig, read_recipe
from unimm.training.tasks.base import build_task
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS, TEXT_KINDS
from unimm.training.trainer import Trainer, train

RECIPE = Path(__file__).parent / "janus-nano-decoupling.yaml"
# kind of sample -> what is scored, and the name of all of it
SCORED = {
    "answer": ("answer.count", "answer.colour", "answer.shape", "answer.relation"),
    "draw": ("draw.one", "draw.count", "draw.relation", "draw.two"),
}
ALL = {"answer": "all answers", "draw": "all images"}
COLUMNS = tuple(name for kind, tasks in SCORED.items() for name in (*tasks, ALL[kind]))


def run_arm(
    name: str, *, recipe: TrainConfig, out: Path, seed: int, minutes: float | None, n: int, device: str, workers: int
) -> dict[str, Any]:
    """Train one experiment with one seed: its steps, what it saw, its last losses, and which examples it has right."""
    recipe = replace(recipe, seed=seed, options={**recipe.options, "experiment": name})
    folder = out / f"{name}-{seed}"
    steps = train_arm(recipe, folder, minutes=minutes, device=device, workers=workers)
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    if not lines:
        raise ValueError(f"{folder} reached step {steps} in {minutes} minutes: expected {recipe.log_every} or more")
    last = json.loads(lines[-1])["losses"]
    trained = Trainer(build_task(without_compile(recipe)), recipe, torch.device(device))
    trained.init_from(folder)
    tasks = [task for kind, some in SCORED.items() if kind in EXPERIMENTS[name].kinds for task in some]
    return {
        "steps": steps,
        **sample_counts(recipe, steps),
        "losses": {kind: last[kind] for kind in SCORED if kind in last},
        "right": right_by_task(trained.model.eval(), tasks, n=n, seed=seed),
    }


def train_arm(recipe: TrainConfig, folder: Path, *, minutes: float | None, device: str, workers: int) -> int:
    """Train for the minutes, or for the recipe's steps, and return the step reached.

    A run of steps goes on where it was stopped; one of minutes begins anew, since its budget is of one go. Raises
    KeyboardInterrupt where the training was stopped before its end.
    """
    if minutes is not None and folder.is_dir():
        shutil.rmtree(folder)
    began = time.monotonic()
    steps = train(
        build_task(recipe),
        recipe,
        folder,
        device=device,
        resume=bool(list_checkpoints(folder)),
        hours=None if minutes is None else minutes / 60,
        workers=workers,
    )
    if steps < recipe.steps and (minutes is None or time.monotonic() - began < 60 * minutes):
        raise KeyboardInterrupt(f"stopped at step {steps}")
    return steps


def without_compile(recipe: TrainConfig) -> TrainConfig:
    """The recipe of a model that is not compiled."""
    return replace(recipe, options={**recipe.options, "compile": False})


def sample_counts(recipe: TrainConfig, steps: int) -> dict[str, int]:
    """How many samples to understand, and to draw, a run has seen."""
    learns = EXPERIMENTS[recipe.options["experiment"]].kinds
    kinds = {task: task.split(".")[0] for task in recipe.options["tasks"]}
    counts = {task: n for task, n in recipe.options["tasks"].items() if kinds[task] in learns}
    parts = {"understood": TEXT_KINDS, "generated": IMAGE_KINDS}
    # what is left of a batch is sampled from the tasks by their numbers
    shares = {part: sum(n for task, n in counts.items() if kinds[task] in names) for part, names in parts.items()}
    return {part: round(steps * recipe.batch_size * share / sum(counts.values())) for part, share in shares.items()}


def study(
    out: Path,
    recipe: Path,
    *,
    seeds: Sequence[int],
    minutes: float | None,
    steps: int | None,
    n: int,
    device: str,
    workers: int,
) -> dict[str, Any]:
    """Run what is not there yet, and write the results. steps: the recipe's unless given."""
    numbers = read_recipe(recipe)
    if steps is not None:
        numbers = replace(numbers, steps=steps, log_every=min(numbers.log_every, steps))
    settings = {
        "budget": f"{numbers.steps} steps each" if minutes is None else f"{minutes:g} minutes each",
        "n": n,
        "device": describe_device(device),
        # the whole recipe, in short
        "recipe": hashlib.sha256(json.dumps(asdict(numbers), sort_keys=True).encode()).hexdigest()[:16],
    }
    run = partial(run_arm, recipe=numbers, out=out, minutes=minutes, n=n, device=device, workers=workers)
    found = kept_arms(out, EXPERIMENTS, seeds, settings, run)
    spent = spent_seconds(one for some in found.values() for one in some)
    made = describe_run(**settings, seeds=list(seeds), seconds=spent)
    result = {"made": made, "arms": {name: summarize_arm(some) for name, some in found.items()}}
    write_results(out, "decoupling", result, results_table(result))
    plot(out / "decoupling.png", result["arms"])
    return result


def describe_device(device: str) -> str:
    """The name of a GPU, or of how many cores how many threads compute."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def summarize_arm(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of an experiment by task, over examples and over seeds, and means over seeds of its other numbers."""
    by_seed = [with_kinds(one["right"]) for one in results]
    return {
        "scores": {name: seeded_score([one[name] for one in by_seed]) for name in by_seed[0]},
        "losses": {kind: over_seeds([one["losses"][kind] for one in results]) for kind in results[0]["losses"]},
        **{name: over_seeds([one[name] for one in results])["mean"] for name in ("steps", "understood", "generated")},
    }


def with_kinds(right: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The examples of each task, and all answers and all images together."""
    known = {kind: [one for task in tasks for one in right.get(task, ())] for kind, tasks in SCORED.items()}
    return {task: list(some) for task, some in right.items()} | {
        ALL[kind]: some for kind, some in known.items() if some
    }


def results_table(result: Mapping[str, Any]) -> str:
    """The tables in markdown: what each experiment saw and its losses, and its scores."""
    trainings: list[list[str]] = []
    scores: list[list[str]] = []
    for name, arm in result["arms"].items():
        samples = (f"{arm[part]:.0f}" for part in ("steps", "understood", "generated"))
        losses = (seeds_text(arm["losses"][kind]) if kind in arm["losses"] else "" for kind in SCORED)
        trainings.append([name, EXPERIMENTS[name].description, *samples, *losses])
        scores += seeded_rows(f"**{name}**", [arm["scores"].get(column) for column in COLUMNS])
    header = [
        "experiment",
        "what it is",
        "steps",
        "samples understood",
        "samples generated",
        "loss of answers",
        "loss of image tokens",
    ]
    return markdown_table(header, trainings) + "\n" + markdown_table(["experiment", *COLUMNS], scores)


def plot(path: Path, arms: Mapping[str, Any]) -> None:
    """Bars of the experiments by task."""
    series = {
        f"{name}: {EXPERIMENTS[name].description}": [
            Bar.of_seeded_score(arm["scores"][column]) if column in arm["scores"] else None for column in COLUMNS
        ]
        for name, arm in arms.items()
    }
    plot_bars(path, [column.replace(".", " ") for column in COLUMNS], series)


def main() -> None:
    """Run the command line."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--minutes", type=float, help="of training, for each run")
    parser.add_argument("--steps", type=int, help="of training, for each run; the recipe's unless given")
    parser.add_argument("--n", type=int, default=200, help="examples a task and seed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command("decoupling", parser, study)
