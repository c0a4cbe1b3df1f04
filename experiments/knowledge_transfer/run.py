"""Does what bagel-nano is taught in words show in its images? Knowledge transfer of UniSandBox (arXiv 2511.20561, 3.3).

    python -m experiments.knowledge_transfer OUT --n 100 --seeds 1 2 3

For each seed characters are invented, and the understanding expert is taught about them by texts alone, as `unimm train
bagel-nano-knowledge` does; then they are asked for in words and drawn, forward (what does NAME like?) and inverse (who likes
it?), with and without thinking. The arms differ in what keeps drawing alive meanwhile: nothing, or images to draw beside the
texts, for which the generation expert stays as it is, too. Writes OUT/knowledge_transfer.json, .md and .png; a stopped
command goes on.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.common import (
    Bar,
    describe_run,
    experiment_parser,
    kept_arms,
    markdown_table,
    plot_bars,
    right_by_task,
    run_command,
    seeded_rows,
    seeded_score,
    spent_seconds,
    unisandbox_right,
    write_results,
)
from unimm import Bagel
from unimm.data.knowledge.files import PROFILES, KnowledgeSet, write_knowledge, write_rows
from unimm.data.shapes import example
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.unisandbox.knowledge import write_knowledge_benchmark
from unimm.training.config import read_recipe, recipe_path
from unimm.training.record_batches import open_groups
from unimm.training.tasks.base import build_task
from unimm.training.trainer import train

# the weight of images to draw beside the texts, whose own are 4 together; None is the model that was taught nothing
ARMS: Mapping[str, float | None] = {"before": None, "texts": 0.0, "texts and images": 6.0}
WORDS = ("words_forward", "words_inverse")
DRAWN = ("forward", "inverse")
COLUMNS = {
    "words_forward": "forward, in words",
    "words_inverse": "inverse, in words",
    "forward": "forward, drawn",
    "forward, think": "forward, thinking",
    "inverse": "inverse, drawn",
    "inverse, think": "inverse, thinking",
    "draw.one": "draw.one",
}
SAMPLER_STEPS = 12
N_CHARACTERS = 10
N_IMAGES = 600
DRAWING_TASKS = ("draw.one", "draw.one", "draw.count", "draw.two")


def write_set(folder: Path, *, seed: int) -> None:
    """Invent the characters of a seed: the texts, the questions, and the images to draw beside them."""
    if (folder / PROFILES).is_file():
        return
    made = KnowledgeSet.invent(N_CHARACTERS, n_reasoning=N_CHARACTERS, world="shapes", seed=seed)
    write_knowledge_benchmark(folder, made)
    write_drawings(folder / "drawings", seed=seed)
    write_knowledge(folder, made)


def write_drawings(folder: Path, *, seed: int) -> None:
    """Images of the train split with their prompts; some have colours or shapes of no name, as in bagel-nano's own
    training."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"drawings/{seed}")
    rows = []
    for i in range(N_IMAGES):
        one = example(DRAWING_TASKS[i % len(DRAWING_TASKS)], i, seed=seed)
        one = augment_novel_attributes(one, rng, colours=0.2, shapes=0.12)
        assert one.target is not None
        Image.fromarray(one.target).save(folder / f"{i}.png")
        rows.append({"target": f"{i}.png", "text": one.prompt})
    write_rows(folder / "all.jsonl", rows)


def teach(out: Path, files: Path, drawing_weight: float, *, model: str, seed: int, steps: int) -> Path:
    """Train a model by the bundled recipe on a set of characters; returns its release."""
    settings = [
        f"data.groups.{name}.paths=['{files / 'data' / name / 'all.jsonl'}']" for name in ("knowledge", "reasoning")
    ]
    if drawing_weight:
        settings += [f"data.groups.drawing.paths=['{files / 'drawings' / 'all.jsonl'}']"]
        settings += [f"data.groups.drawing.weight={drawing_weight}"]
    settings += [f"seed={seed}", f"model.from_pretrained={model}"]
    settings += [f"{name}={steps}" for name in ("steps", "save_every", "sample_every", "log_every")]
    recipe = read_recipe(recipe_path("bagel-nano-knowledge"), settings=settings)
    assert recipe.data is not None
    train(build_task(recipe), recipe, out, workers=0, groups=open_groups(recipe.data))
    return out / "release"


def run_arm(arm: str, *, out: Path, model_name: str, seed: int, n: int, steps: int) -> dict[str, Any]:
    """What a seed's model of an arm answers and draws right."""
    files = out / f"characters-{seed}"
    write_set(files, seed=seed)
    folder = out / f"run-{arm.replace(' ', '-')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a command that was stopped
    drawing_weight = ARMS[arm]
    name = model_name
    if drawing_weight is not None:
        name = str(teach(folder / "training", files, drawing_weight, model=model_name, seed=seed, steps=steps))
    right: dict[str, list[int]] = {}
    for tasks, think in ((WORDS, False), (DRAWN, False), (DRAWN, True)):
        options = BenchmarkOptions(items=str(files), n=n, seed=seed, think=think, tasks=tasks, supports_thinking=True)
        found = unisandbox_right(name, folder / ("-".join(tasks) + "-think" * think), options, steps=SAMPLER_STEPS)
        right |= {f"{task}, think" if think else task: some for task, some in found.items()}
    model = Bagel.from_pretrained(name)
    right |= right_by_task(model, ["draw.one"], n=n, seed=seed, options={"steps": SAMPLER_STEPS})
    shutil.rmtree(folder)
    return {"right": right}


def study(out: Path, model: str, *, n: int, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Run what is not there yet, and write the results."""
    settings = {"model": model, "n": n, "steps": steps}
    found = kept_arms(out, ARMS, seeds, settings, partial(run_arm, out=out, model_name=model, n=n, steps=steps))
    spent = spent_seconds(one for some in found.values() for one in some)
    made = describe_run(**settings, sampler_steps=SAMPLER_STEPS, seeds=list(seeds), seconds=spent)
    result = {"made": made, "arms": summarize(found)}
    write_results(out, "knowledge_transfer", result, results_table(result))
    plot(out / "knowledge_transfer.png", result["arms"])
    return result


def summarize(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The scores of each arm, by what was asked, over items and over seeds."""
    return {
        arm: {column: seeded_score([one["right"][column] for one in some]) for column in COLUMNS}
        for arm, some in found.items()
    }


def results_table(result: Mapping[str, Any]) -> str:
    """The table in markdown."""
    rows = [
        row
        for arm, scores in result["arms"].items()
        for row in seeded_rows(f"**{arm}**", [scores[column] for column in COLUMNS])
    ]
    return markdown_table(["", *COLUMNS.values()], rows)


def plot(path: Path, arms: Mapping[str, Any]) -> None:
    """Bars by what was asked, a series an arm."""
    series = {arm: [Bar.of_seeded_score(scores[column]) for column in COLUMNS] for arm, scores in arms.items()}
    plot_bars(path, list(COLUMNS.values()), series)


def main() -> None:
    """Run the command line."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--model", default="bagel-nano")
    parser.add_argument("--n", type=int, default=100, help="questions a task and seed")
    parser.add_argument("--steps", type=int, default=400, help="of teaching")
    run_command("knowledge_transfer", parser, study)
