"""Janus's ablation of decoupled encoders (arXiv 2410.13848, table 5) at nano size: all experiments on one budget, in
one table.

    python -m experiments.decoupling runs/decoupling --minutes 15 --seeds 0
    python -m experiments.decoupling runs/decoupling --steps 6000 --seeds 0 1 2 --device cuda

Trains the experiments A, B, D, E and F of janus-nano-decoupling.yaml, scores each on held-out pairs, and writes
OUT/decoupling.md and OUT/decoupling.json. A budget of minutes is fair only where nothing else runs beside. Runs that
are scored already are kept, so a stopped command goes on with the next one; a run that was stopped midway is to be
deleted.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from experiments.decoupling.task import EXPERIMENTS
from unimm.evaluation.benchmarks.shapes import evaluate
from unimm.training.config import TrainConfig, read_recipe
from unimm.training.tasks.base import build_task
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS, TEXT_KINDS
from unimm.training.trainer import Trainer, train

RECIPE = Path(__file__).parent / "janus-nano-decoupling.yaml"
ANSWER_TASKS = ("answer.count", "answer.colour", "answer.shape", "answer.relation")
DRAW_TASKS = ("draw.one", "draw.count", "draw.relation", "draw.two")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A set of runs, on a budget of minutes, of steps, or of the recipe's own steps."""

    out: Path
    recipe: TrainConfig
    seeds: tuple[int, ...]
    minutes: float | None
    steps: int | None
    # of each task
    n_examples: int
    # of the examples
    eval_seed: int
    device: str
    workers: int = 1


def run(study: Study) -> None:
    """Train and score what is not scored yet, then write the table."""
    found = [run_experiment(study, name, seed) for name in EXPERIMENTS for seed in study.seeds]
    contents = {"made": settings(study), "runs": found}
    for name, text in (
        ("decoupling.json", json.dumps(contents, indent=1) + "\n"),
        ("decoupling.md", results_table(study, found)),
    ):
        (study.out / name).write_text(text, encoding="utf-8")


def run_experiment(study: Study, name: str, seed: int) -> dict[str, Any]:
    """Train and score one experiment with one seed, unless that was done: its steps, seconds, losses and scores."""
    folder = study.out / f"{name}-{seed}"
    done = folder / "scores.json"
    recipe = replace(study.recipe, seed=seed, options={**study.recipe.options, "experiment": name})
    if study.steps is not None:
        recipe = replace(recipe, steps=study.steps, log_every=min(recipe.log_every, study.steps))
    asked = {key: value for key, value in settings(study).items() if key not in ("seeds", "date")}
    asked["recipe"] = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:16]
    if done.is_file():
        result = json.loads(done.read_text())
        if result["asked"] != asked:
            raise ValueError(
                f"{done} was made under {result['asked']}, not {asked}: choose another folder, or delete it"
            )
        return result
    began = time.monotonic()
    hours = None if study.minutes is None else study.minutes / 60
    steps = train(build_task(recipe), recipe, folder, device=study.device, hours=hours, workers=study.workers)
    seconds = time.monotonic() - began
    if steps < recipe.steps and (study.minutes is None or seconds < 60 * study.minutes):
        raise KeyboardInterrupt(f"stopped at step {steps}")
    scores = {task: asdict(score) for task, score in evaluate_run(study, recipe, folder).items()}
    lines = (folder / "log.jsonl").read_text().splitlines()
    if not lines:
        raise ValueError(
            f"{folder} reached step {steps} in {study.minutes} minutes: expected {recipe.log_every} or more"
        )
    last = json.loads(lines[-1])["losses"]
    result = {"asked": asked, "experiment": name, "seed": seed, "steps": steps, "seconds_of_last_call": round(seconds)}
    losses = {kind: last[kind] for kind in ("answer", "draw") if kind in last}
    result |= sample_counts(recipe, steps) | {"losses": losses, "scores": scores}
    done.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def evaluate_run(study: Study, recipe: TrainConfig, folder: Path) -> dict[str, Any]:
    """Accuracies of the averaged weights of a run, on what it learned."""
    recipe = replace(recipe, options={**recipe.options, "compile": False})
    trainer = Trainer(build_task(recipe), recipe, torch.device(study.device))
    trainer.init_from(folder)
    learns = EXPERIMENTS[recipe.options["experiment"]].kinds
    tasks = [task for task in (*ANSWER_TASKS, *DRAW_TASKS) if task.split(".")[0] in learns]
    return evaluate(trainer.model.eval(), n=study.n_examples, seed=study.eval_seed, tasks=tasks)


def sample_counts(recipe: TrainConfig, steps: int) -> dict[str, int]:
    """How many samples to understand, and to draw, a run has seen."""
    learns = EXPERIMENTS[recipe.options["experiment"]].kinds
    kinds = {task: task.split(".")[0] for task in recipe.options["tasks"]}
    counts = {task: n for task, n in recipe.options["tasks"].items() if kinds[task] in learns}
    parts = {"understood": TEXT_KINDS, "generated": IMAGE_KINDS}
    # what is left of a batch is sampled from the tasks by their numbers
    shares = {part: sum(n for task, n in counts.items() if kinds[task] in names) for part, names in parts.items()}
    return {part: round(steps * recipe.batch_size * share / sum(counts.values())) for part, share in shares.items()}


def settings(study: Study) -> dict[str, Any]:
    """What the numbers depend on."""
    gpu = torch.cuda.get_device_name() if study.device.startswith("cuda") else None
    budget = f"{study.minutes:g} minutes each" if study.minutes else f"{study.steps or study.recipe.steps} steps each"
    return {
        "budget": budget,
        "seeds": list(study.seeds),
        "examples": study.n_examples,
        "eval_seed": study.eval_seed,
        "device": gpu or f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def results_table(study: Study, found: Sequence[dict[str, Any]]) -> str:
    """The table in markdown: a row for each run, and where there are several seeds a row of their means."""
    made = settings(study)
    tasks = [*ANSWER_TASKS, "mean answer", *DRAW_TASKS, "mean drawing"]
    names = [
        "",
        "what it is",
        "seed",
        "steps",
        "samples understood / generated",
        "loss of answers / image tokens",
        *tasks,
    ]
    lines = [
        f"Budget: {made['budget']}, seeds {', '.join(map(str, study.seeds))}. {made['device']}, torch {made['torch']}.",
        f"{made['date']}. Accuracy on {study.n_examples} unseen examples a task (seed {study.eval_seed}), with 95 % intervals.",
        f"A dash: not learned. Losses are means of the last {study.recipe.log_every} steps that were logged, in nats a token.",
        "B has another image tokenizer than the rest: its loss of image tokens is not to be compared with theirs.",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    for name, experiment in EXPERIMENTS.items():
        runs = [result for result in found if result["experiment"] == name]
        lines += [
            table_row([name, experiment.description, str(result["seed"])], [result], spread=True) for result in runs
        ]
        if len(runs) > 1:
            lines.append(table_row([name, experiment.description, "mean"], runs, spread=False))
    return "\n".join(lines) + "\n"


def table_row(begins: list[str], runs: Sequence[dict[str, Any]], *, spread: bool) -> str:
    """Means over runs; with their intervals, where there is one run."""
    cells = [*begins, f"{mean(one['steps'] for one in runs):.0f}"]
    cells.append(" / ".join(f"{mean(one[part] for one in runs):.0f}" for part in ("understood", "generated")))
    losses = {kind: [one["losses"][kind] for one in runs if kind in one["losses"]] for kind in ("answer", "draw")}
    cells.append(" / ".join(f"{mean(found):.3f}" if found else "-" for found in losses.values()))
    for tasks in (ANSWER_TASKS, DRAW_TASKS):
        known = [[one["scores"][task] for one in runs] for task in tasks if task in runs[0]["scores"]]
        if not known:
            cells += ["-"] * (len(tasks) + 1)
            continue
        for scores in known:
            interval = f" ({scores[0]['low']:.2f}-{scores[0]['high']:.2f})" if spread else ""
            cells.append(f"{mean(score['accuracy'] for score in scores):.2f}{interval}")
        cells.append(f"{mean(score['accuracy'] for scores in known for score in scores):.3f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, help="of training, for each run")
    parser.add_argument("--steps", type=int, help="of training, for each run; the recipe's unless given")
    parser.add_argument("-n", dest="n_examples", type=int, default=200, help="examples a task")
    parser.add_argument("--eval-seed", type=int, default=1, help="the seed of the examples")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = vars(given) | {"seeds": tuple(given.seeds), "recipe": read_recipe(given.recipe)}
    run(Study(**options))
    print((given.out / "decoupling.md").read_text(), end="")
