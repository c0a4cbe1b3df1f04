"""Does an edit's loss have to count more where the image changes, and by which function of the area? UniWorld's question
(arXiv 2506.03147, section 3.5) at nano size.

    python -m experiments.edit_weights OUT --n 12 --steps 8 --train-steps 50 --samples 512 --seeds 1 2

uniworld-nano's denoiser and projectors go on training on edits alone, once for each weight: none, and the four candidate
functions of x, the image's area over that of the edit. All arms of a seed train on the same samples, noise and timesteps,
of a cache that is computed once. Measured are edits of test items, by the exact judge, and the unweighted flow loss on
held-out samples, inside of what changes and outside of it. Writes OUT/edit_weights.json, .md and .png; a stopped command
goes on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.arms import arm_recipe, train_arms
from experiments.common import (
    Bar,
    describe_run,
    difference_text,
    experiment_parser,
    kept_arms,
    markdown_table,
    over_seeds,
    paired,
    plot_bars,
    right_by_task,
    run_command,
    score_text,
    seeded_score,
    seeds_text,
    spent_seconds,
    with_all,
    write_results,
)
from unimm.models.uniworld.model import UniWorld
from unimm.training.cache import FeatureCache, Record, use_feature_cache
from unimm.training.config import CacheConfig, TrainConfig
from unimm.training.fields import held_out_seed
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS
from unimm.training.tasks.edit_weights import AREA_FUNCTIONS
from unimm.training.tasks.uniworld import UniWorldTask, prepare_uniworld, uniworld_builder
from unimm.training.tasks.uniworld_data import UniWorldDataset, encoded_from_records
from unimm.training.tasks.uniworld_samples import UniWorldBatch, UniWorldTrainingConfig

TASKS = ("edit.recolour", "edit.remove", "edit.add")
# samples of the held-out losses
HELD_OUT = 64
# the weights before any more training, no weights, and the candidates; the release was trained with log
ARMS = ("before", "even", *AREA_FUNCTIONS)
OPTIONS = UniWorldTrainingConfig(
    tasks=dict.fromkeys(TASKS, 1),
    trained="all",
    frozen=("auxiliary.siglip.",),
    timesteps_per_image=2,
    dropout=0.1,
    append_vision_start=False,
    # of which every other weight follows
    edit_weights="linear",
    guidance=1.0,
    novel_colours=0.25,
    novel_shapes=0.1,
    compile=False,
)


@dataclass(frozen=True)
class ReweightedCache(FeatureCache):
    """A cache whose records have weights of another function of the edit's area; "even" for none."""

    function: str = "even"

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        return {**record, "weights": reweighted(record["weights"], self.function)}


def reweighted(weights: Tensor, function: str) -> Tensor:
    """Weights by another function, from those of `linear`, x itself in the region and 1 outside of it."""
    if function == "even":
        return torch.ones_like(weights)
    return torch.where(weights > 1, AREA_FUNCTIONS[function](float(weights.max())), 1.0)


def build_task(model_name: str, recipe: TrainConfig) -> UniWorldTask:
    """A release to train on the shapes world, with the VAE and the MLLM as they are."""
    model = UniWorld.from_pretrained(model_name)
    prepare_uniworld(model, OPTIONS, seed=recipe.seed)
    builder = replace(uniworld_builder(model, OPTIONS), kinds=IMAGE_KINDS, reference_latents=True)
    dataset = UniWorldDataset(options=OPTIONS, builder=builder, batch_size=recipe.batch_size, seed=recipe.seed)
    return UniWorldTask(model, dataset, Path())


def run_arm(
    name: str,
    *,
    model_name: str,
    out: Path,
    seed: int,
    n: int,
    steps: int | None,
    train_steps: int,
    samples: int,
) -> dict[str, Any]:
    """Which test items the arm edits right, and its held-out losses. out: where the cache of a seed is."""
    folder = out / f"cache-{seed}"
    weights = {kind: float(kind == "edit") for kind in IMAGE_KINDS}
    recipe = arm_recipe("uniworld", seed=seed, steps=train_steps, batch_size=12, lr=3e-4, loss_weights=weights)
    recipe = replace(recipe, cache=CacheConfig(samples=samples, folder=str(folder)))
    task = build_task(model_name, recipe)
    if name != "before":
        use_feature_cache(task, recipe, folder, workers=0)
        task.batch = replace(task.batch, cache=ReweightedCache(folder, samples, name))
        train_arms([task], recipe)
    task.model.eval()
    options = {} if steps is None else {"steps": steps}
    return {
        "right": right_by_task(task.model, TASKS, n=n, seed=seed, options=options),
        "losses": region_losses(task),
    }


@torch.no_grad()
def region_losses(task: UniWorldTask) -> dict[str, float]:
    """The mean squared error of the velocity on held-out edits, inside of what changes and outside of it."""
    held_out = replace(task.batch, seed=held_out_seed(0), cache=None)
    rng = random.Random("edit_weights/held out")
    samples = [held_out.sample(one, rng) for one in held_out.examples(0, HELD_OUT, rng)]
    encoded = encoded_from_records(task.cache_records(task.builder.inputs(samples, rng)))
    batch = task.builder.noised(encoded, rng)
    sums = {"inside": [0.0, 0.0], "outside": [0.0, 0.0]}
    changed = (encoded.weights > 1).float()
    for region, mask in (("inside", changed), ("outside", 1 - changed)):
        total = losses_under(task, replace(batch, samples=replace(encoded, weights=mask)))
        sums[region][0] += total
        sums[region][1] += float(mask[batch.sample_indices].flatten(1).mean(1).sum())
    return {region: total / area for region, (total, area) in sums.items()}


def losses_under(task: UniWorldTask, batch: UniWorldBatch) -> float:
    """The sum over noised copies of the mean of mask times squared error."""
    losses = task.losses(batch)
    return float(sum(one.total for one in losses.values()))


def study(
    out: Path, model: str, *, n: int, seeds: Sequence[int], steps: int | None, train_steps: int, samples: int
) -> dict[str, Any]:
    """Run what is not there yet, and write the results."""
    settings = {"model": model, "n": n, "steps": steps, "train_steps": train_steps, "samples": samples}
    numbers = {name: value for name, value in settings.items() if name != "model"}
    found = kept_arms(out, ARMS, seeds, settings, partial(run_arm, model_name=model, out=out, **numbers))
    spent = spent_seconds(one for some in found.values() for one in some)
    result = {"made": describe_run(**settings, seeds=list(seeds), seconds=spent), **summarize(found)}
    write_results(out, "edit_weights", result, results_table(result))
    plot(out / "edit_weights.png", result["arms"])
    return result


def summarize(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Scores and losses of each arm, and its difference to training without weights, item by item."""
    arms = {}
    for name, results in found.items():
        right = [with_all(one["right"]) for one in results]
        arms[name] = {
            "scores": {task: seeded_score([one[task] for one in right]) for task in (*TASKS, "all")},
            "losses": {
                region: over_seeds([one["losses"][region] for one in results]) for region in ("inside", "outside")
            },
        }
    every = {
        name: [value for one in results for value in with_all(one["right"])["all"]] for name, results in found.items()
    }
    changes = {name: paired(every["even"], every[name]) for name in ARMS if name != "even"}
    return {"arms": arms, "changes": changes}


def results_table(result: Mapping[str, Any]) -> str:
    """The table in markdown."""
    columns = (*TASKS, "all")
    rows = []
    for name, arm in result["arms"].items():
        change = result["changes"].get(name)
        rows.append(
            [
                name,
                *(score_text(arm["scores"][task]["items"]) for task in columns),
                seeds_text(arm["scores"]["all"]["seeds"]),
                "" if change is None else difference_text(change),
                *(seeds_text(arm["losses"][region]) for region in ("inside", "outside")),
            ]
        )
    header = ["weight", *columns, "all, by seeds", "all, less even", "loss inside", "loss outside"]
    return markdown_table(header, rows)


def plot(path: Path, arms: Mapping[str, Any]) -> None:
    """Bars of the arms by task."""
    columns = (*TASKS, "all")
    series = {name: [Bar.of_seeded_score(arm["scores"][task]) for task in columns] for name, arm in arms.items()}
    plot_bars(path, columns, series)


def main() -> None:
    """Run the command line."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--model", default="uniworld-nano")
    parser.add_argument("--n", type=int, default=30, help="items a task and seed")
    parser.add_argument("--steps", type=int, help="of the sampler; the model's own unless given")
    parser.add_argument("--train-steps", type=int, default=100, help="of each arm")
    parser.add_argument("--samples", type=int, default=1536, help="of the cache")
    run_command("edit_weights", parser, study)
