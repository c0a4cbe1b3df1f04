"""What does an edit lose without the ViT's tokens? BAGEL's ablation (arXiv 2505.14683, section 6.1.1) at nano size.

    python -m experiments.edit_conditions OUT --n 30 --steps 12 --train-steps 60 --seeds 1 2 3 --tuned-seeds 1

bagel-nano sees an image to edit twice: as VAE latents and as the ViT's tokens. Here each of the two is left out, when
the image is edited (the released weights saw that in a tenth of their training), and in a short fine-tuning on edits
too, beside one that keeps both. A seed makes the questions, the noise, and the fine-tuning's batches. Writes
OUT/edit_conditions.json, .md and .png; a stopped command goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from experiments.arms import arm_recipe, bagel_dataset, bagel_options, train_arms
from experiments.common import (
    SEEDS,
    Bar,
    describe_run,
    difference_text,
    experiment_parser,
    kept_arms,
    markdown_table,
    paired,
    plot_bars,
    right_by_task,
    run_command,
    seeded_rows,
    seeded_score,
    spent_seconds,
    with_all,
    write_results,
)
from unimm.models.bagel.cfg_contexts import ImageParts
from unimm.models.bagel.model import Bagel
from unimm.sequence.parts import position_gap
from unimm.training.freezing import freeze
from unimm.training.tasks.bagel import BagelDataset, BagelTask

TASKS = ("edit.recolour", "edit.remove", "edit.add", "edit.swap", "edit.resize")
# the forms in which an image to edit is a condition
FORMS = {"both": ("gen_image", "und_image"), "latents alone": ("gen_image",), "ViT alone": ("und_image",)}
# arm -> what its fine-tuning sees of an image to edit (None for no fine-tuning), and its edits
ARMS = {
    "released, both": (None, "both"),
    "released, latents alone": (None, "latents alone"),
    "released, ViT alone": (None, "ViT alone"),
    "tuned with both": ("both", "both"),
    "tuned on latents alone": ("latents alone", "latents alone"),
}
# arms that are compared: without the ViT's tokens against with them
PAIRS = (("released, both", "released, latents alone"), ("tuned with both", "tuned on latents alone"))
# of the recipe of bagel-nano
DROPOUT = {"text": 0.1, "vae": 0.1, "vit": 0.1}


class PartialBagel(Bagel):
    """BAGEL that sees an image to edit in some of its forms; in place of the others stands a gap, as in training."""

    forms = FORMS["both"]

    def image_parts(self, image: Image.Image, *, noise: Tensor | None, latents: bool) -> ImageParts:
        """As BAGEL's, without the forms that are left out."""
        parts, size = super().image_parts(image, noise=noise, latents=latents)
        return [part if part.kind in self.forms else position_gap(1) for part in parts], size


def run_arm(name: str, *, model_name: str, seed: int, n: int, steps: int | None, train_steps: int) -> dict[str, Any]:
    """Which test items of each task the arm edits right."""
    tuned, seen = ARMS[name]
    model = PartialBagel.from_pretrained(model_name)
    losses = {} if tuned is None else fine_tune(model, tuned, seed=seed, steps=train_steps)
    model.forms = FORMS[seen]
    options = {} if steps is None else {"steps": steps}
    return {"right": right_by_task(model, TASKS, n=n, seed=seed, options=options), "losses": losses}


def fine_tune(model: Bagel, seen: str, *, seed: int, steps: int) -> dict[str, float]:
    """Train all but the ViT and the VAE on edits; returns the means of the losses over the run."""
    freeze(model, ("vae.", "vision."))
    dropout = {
        kind: rate if form in FORMS[seen] else 1.0
        for (kind, rate), form in zip(DROPOUT.items(), ("gen_image", "gen_image", "und_image"), strict=True)
    }
    options = bagel_options(dict.fromkeys(TASKS, 1), dropout=dropout)
    weights = {name: float(name == "edit") for name in BagelTask.loss_names}
    recipe = arm_recipe("bagel", seed=seed, steps=steps, batch_size=8, lr=1e-4, loss_weights=weights)
    dataset = bagel_dataset(BagelDataset, model, options, recipe)
    (trainer,) = train_arms([BagelTask(model, dataset, Path())], recipe)
    return trainer.report()["losses"]


def study(
    out: Path,
    model: str,
    *,
    n: int,
    seeds: Sequence[int],
    tuned_seeds: Sequence[int],
    steps: int | None,
    train_steps: int,
) -> dict[str, Any]:
    """Run what is not there yet, and write the results. tuned_seeds: those of the arms with a fine-tuning."""
    settings = {"model": model, "n": n, "steps": steps, "train_steps": train_steps}
    run = partial(run_arm, model_name=model, n=n, steps=steps, train_steps=train_steps)
    released = [name for name, (tuned, _) in ARMS.items() if tuned is None]
    tuned = [name for name in ARMS if name not in released]
    found = kept_arms(out, released, seeds, {**settings, "train_steps": 0}, run)
    found |= kept_arms(out, tuned, tuned_seeds, settings, run)
    spent = spent_seconds(one for some in found.values() for one in some)
    made = describe_run(**settings, seeds=list(seeds), tuned_seeds=list(tuned_seeds), seconds=spent)
    result = {"made": made, **summarize(found)}
    write_results(out, "edit_conditions", result, results_table(result))
    plot(out / "edit_conditions.png", result["arms"])
    return result


def summarize(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Scores of each arm by task, over items and over seeds; and what leaving the ViT's tokens out changes, paired."""
    arms = {}
    for name, results in found.items():
        by_seed = [with_all(one["right"]) for one in results]
        arms[name] = {task: seeded_score([one[task] for one in by_seed]) for task in (*TASKS, "all")}
    changes = {
        f"{b} - {a}": {
            task: paired(
                [right for one in found[a] for right in with_all(one["right"])[task]],
                [right for one in found[b] for right in with_all(one["right"])[task]],
            )
            for task in (*TASKS, "all")
        }
        for a, b in PAIRS
    }
    return {"arms": arms, "changes": changes}


def results_table(result: Mapping[str, Any]) -> str:
    """The tables in markdown."""
    columns = (*TASKS, "all")
    rows = [
        row
        for name, arm in result["arms"].items()
        for row in seeded_rows(f"**{name}**", [arm[task] for task in columns])
    ]
    changes = [[name, *(difference_text(one[task]) for task in columns)] for name, one in result["changes"].items()]
    return markdown_table(["arm", *columns], rows) + "\n" + markdown_table(["paired difference", *columns], changes)


def plot(path: Path, arms: Mapping[str, Any]) -> None:
    """Bars of the arms by task."""
    columns = (*TASKS, "all")
    series = {name: [Bar.of_seeded_score(arm[task]) for task in columns] for name, arm in arms.items()}
    plot_bars(path, columns, series)


def main() -> None:
    """Run the command line."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--model", default="bagel-nano")
    parser.add_argument("--tuned-seeds", type=int, nargs="+", default=list(SEEDS), help="of the fine-tunings")
    parser.add_argument("--n", type=int, default=40, help="items a task and seed")
    parser.add_argument("--steps", type=int, help="of the sampler; the model's own unless given")
    parser.add_argument("--train-steps", type=int, default=100, help="of each fine-tuning")
    run_command("edit_conditions", parser, study)
