"""Dense, mixture of experts or mixture of transformers on one budget: BAGEL's comparison (arXiv 2505.14683, section 4.2.5)
at nano size.

    python -m experiments.expert_variants OUT --steps 400 --seeds 1 2 3

Three decoders of one width learn to generate, edit, caption and answer, from scratch, on the same batches with the same
noise: `dense` has one set of weights for all tokens, `MoE` a second feed-forward for the tokens of VAE latents, `MoT` a
second set of all weights of a block for them. All begin as one function, since the second set begins as a copy, and a step
costs all the same FLOPs, since a token passes one set. The ViT, the VAE and the tokenizer are bagel-nano's, and are not
trained. Measured are both objectives on held-out batches on the way. Writes OUT/expert_variants.json, .md and .png; a
stopped command goes on with the next seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.arms import arm_recipe, bagel_dataset, bagel_options, train_arms
from experiments.common import (
    describe_run,
    experiment_parser,
    kept_result,
    markdown_table,
    over_seeds,
    plot_curves,
    run_command,
    seeds_text,
    spent_seconds,
    write_results,
)
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.model import Bagel
from unimm.nn.decoder import Decoder
from unimm.sequence.packing import PackedBatch
from unimm.training.fields import held_out_seed
from unimm.training.freezing import freeze
from unimm.training.tasks.bagel import (
    IMAGE_KINDS,
    TEXT_KINDS,
    BagelBatch,
    BagelDataset,
    BagelTask,
    init_bagel,
)
from unimm.training.trainer import Trainer

VARIANTS = ("dense", "MoE", "MoT")
OBJECTIVES = {"mse": IMAGE_KINDS, "ce": TEXT_KINDS}
TITLES = {"mse": "images: squared error of the velocity", "ce": "texts: cross entropy, nats a token"}
LLM = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 192}
TASKS = {
    "draw.one": 3,
    "draw.count": 3,
    "draw.two": 3,
    "edit.recolour": 2,
    "edit.remove": 1,
    "caption": 3,
    "answer.count": 3,
    "answer.colour": 3,
    "answer.shape": 3,
}
# of the recipe of bagel-nano; what is not learned here has none
LOSS_WEIGHTS = {"draw": 1.0, "edit": 1.0, "caption": 0.05, "answer": 0.3, "reason": 0.0, "think": 0.0, "fact": 0.0}
OPTIONS = bagel_options(TASKS)
HELD_OUT_BATCHES = 4


class VariantTask(BagelTask):
    """BAGEL on the shapes world, beside others that train on the same batches: latents are encoded by one of them."""

    def __init__(self, model: Bagel, batch: BagelDataset, encoded: dict[int, PackedBatch]) -> None:
        """encoded: the last batch with its latents, by its id; shared."""
        super().__init__(model, batch, Path())
        self.encoded = encoded

    def encode_latents(self, batch: BagelBatch) -> PackedBatch:
        """The pack with its latents in place."""
        if id(batch.pack) not in self.encoded:
            self.encoded.clear()
            self.encoded[id(batch.pack)] = super().encode_latents(batch)
        return self.encoded[id(batch.pack)]


def build_variant(variant: str, released: Bagel, *, seed: int) -> Bagel:
    """A small BAGEL from scratch around the ViT, the VAE and the tokenizer of a release, whose experts share weights."""
    files = released.config.to_json()
    llm = {**files["llm_config.json"], **LLM}
    torch.manual_seed(seed)
    model = Bagel(BagelConfig.from_json(llm, files["vit_config.json"], files["config.json"]))
    init_bagel(model)
    model.vae, model.vision, model.tokenizer = released.vae, released.vision, released.tokenizer
    share_experts(model.decoder, variant)
    freeze(model, ("vae.", "vision."))
    return model


def share_experts(decoder: Decoder, variant: str) -> None:
    """Let the expert of generation begin as that of understanding, and be the same where the variant has one."""
    for block in decoder.blocks:
        und, gen = block.experts["und"], block.experts["gen"]
        gen.load_state_dict(und.state_dict())
        if variant == "dense":
            block.experts["gen"] = und
        elif variant == "MoE":
            for name, part in und.named_children():
                if name != "mlp":
                    setattr(gen, name, part)
    if variant == "dense":
        decoder.norms["gen"] = decoder.norms["und"]


def run_seed(model_name: str, *, seed: int, steps: int, every: int) -> dict[str, Any]:
    """The held-out losses of all variants on the way, and their numbers of parameters."""
    released = Bagel.from_pretrained(model_name)
    recipe = arm_recipe(
        "bagel",
        seed=seed,
        steps=steps,
        batch_size=sum(TASKS.values()),
        lr=2e-3,
        loss_weights=LOSS_WEIGHTS,
        weight_decay=0.05,
        muon=("decoder.blocks",),
    )
    encoded: dict[int, PackedBatch] = {}
    tasks = []
    for variant in VARIANTS:
        model = build_variant(variant, released, seed=seed)
        dataset = bagel_dataset(BagelDataset, model, OPTIONS, recipe)
        tasks.append(VariantTask(model, dataset, encoded))
    held_out = replace(tasks[0].batch, seed=held_out_seed(0))
    batches = [held_out(i) for i in range(HELD_OUT_BATCHES)]
    # encoded once for all measurements
    packs = [BagelTask.encode_latents(tasks[0], batch) for batch in batches]
    curves: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}

    def watch(step: int, trainers: Sequence[Trainer]) -> None:
        for variant, trainer in zip(VARIANTS, trainers, strict=True):
            found = held_out_losses(trainer.model, packs, batches)
            curves[variant].append({"step": step, **found})

    train_arms(tasks, recipe, every=every, watch=watch)
    parameters = {
        variant: sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        for variant, task in zip(VARIANTS, tasks, strict=True)
    }
    return {"curves": curves, "parameters": parameters}


@torch.no_grad()
def held_out_losses(model: Any, packs: Sequence[PackedBatch], batches: Sequence[BagelBatch]) -> dict[str, float]:
    """Both objectives: means over all noised latents, and over all labelled tokens."""
    model.eval()
    sums = {"mse": 0.0, "ce": 0.0}
    counts = {"mse": 0, "ce": 0}
    for pack, batch in zip(packs, batches, strict=True):
        losses = model(pack, batch.noise)
        for name, rows in (("mse", losses.mse.mean(-1)), ("ce", losses.ce)):
            sums[name] += float(rows.sum())
            counts[name] += len(rows)
    return {name: sums[name] / counts[name] for name in sums}


def study(out: Path, model: str, *, seeds: Sequence[int], steps: int, every: int) -> dict[str, Any]:
    """Run what is not there yet, and write the results."""
    settings = {"model": model, "steps": steps, "every": every}
    found = [
        kept_result(
            out / f"seed-{seed}.json",
            {"seed": seed, **settings, "llm": LLM, "tasks": TASKS},
            partial(run_seed, model, seed=seed, steps=steps, every=every),
        )
        for seed in seeds
    ]
    numbers = {"batch": sum(TASKS.values()), "llm": LLM, "seeds": list(seeds)}
    made = describe_run(**settings, **numbers, seconds=spent_seconds(found))
    result = {"made": made, **summarize(found)}
    write_results(out, "expert_variants", result, results_table(result))
    plot_curves(out / "expert_variants.png", panels(result))
    return result


def summarize(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Final losses of each variant over seeds, differences to dense seed by seed, and the curves."""
    final = {
        variant: {name: [one["curves"][variant][-1][name] for one in found] for name in OBJECTIVES}
        for variant in VARIANTS
    }
    variants = {
        variant: {
            "parameters": found[0]["parameters"][variant],
            "final": {name: over_seeds(values) for name, values in losses.items()},
            "less_dense": {
                name: over_seeds([a - b for a, b in zip(values, final["dense"][name], strict=True)])
                for name, values in losses.items()
            },
            "curves": [one["curves"][variant] for one in found],
        }
        for variant, losses in final.items()
    }
    return {"variants": variants}


def results_table(result: Mapping[str, Any]) -> str:
    """The table in markdown."""
    rows = []
    for variant, one in result["variants"].items():
        losses = (seeds_text(one["final"][name]) for name in OBJECTIVES)
        less = ("" if variant == "dense" else signed(one["less_dense"][name]) for name in OBJECTIVES)
        rows.append([variant, f"{one['parameters']:,}", *losses, *less])
    header = ["decoder", "trained parameters", "images", "texts", "images, less dense", "texts, less dense"]
    return markdown_table(header, rows)


def signed(one: Mapping[str, Any]) -> str:
    """A difference over seeds with its interval."""
    interval = "" if one["low"] is None else f" ({one['low']:+.3f} - {one['high']:+.3f})"
    return f"{one['mean']:+.3f}{interval}"


def panels(result: Mapping[str, Any]) -> dict[str, dict[str, list[list[tuple[int, float]]]]]:
    """The curves of the figure: objective -> variant -> run -> (step, loss)."""
    return {
        TITLES[name]: {
            variant: [[(point["step"], point[name]) for point in run] for run in one["curves"]]
            for variant, one in result["variants"].items()
        }
        for name in OBJECTIVES
    }


def main() -> None:
    """Run the command line."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--model", default="bagel-nano", help="whose ViT, VAE and tokenizer are taken")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=40, help="steps between measurements")
    run_command("expert_variants", parser, study)
