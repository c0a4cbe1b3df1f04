"""The contract of training: in a step of a recipe every parameter gets a gradient, but for those that are named here,
with why.

Every bundled model has a recipe of its name. What one needs of another (runs/NAME/release) is made by that one,
untrained.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from walk import BUNDLED

import unimm
from unimm.training.config import read_recipe
from unimm.training.losses import mean_losses
from unimm.training.tasks.base import build_task

RECIPES = Path(unimm.__file__).parent / "training" / "recipes"
# samples a batch: enough for every kind of task that a recipe has
SAMPLES = 16
# options, where a recipe has them: what costs time and changes no gradient, and stages that leave out a part at first
OPTIONS = {
    "compile": False,
    "measured_scenes": 8,
    "scored_examples": 2,
    "scored_scenes": 2,
    "unquantized_steps": 0,
    "vision_steps": 0,
}

BEFORE = "trained before, by a recipe of its own"
# what is not trained, by the beginning of its parameters' names; each must be met
FROZEN = {
    "bagel-nano": {"vae.": BEFORE, "vision.": BEFORE},
    "janus-nano": {"vq.": BEFORE, "vision.": BEFORE},
    "janusflow-nano": {"vae.": BEFORE, "vision.": BEFORE},
    "metaquery-nano": {"mllm.": BEFORE, "vae.": BEFORE, "queries": BEFORE},
    "showo-nano": {"vq.": BEFORE},
    "uniworld-nano": {
        "mllm.": BEFORE,
        "auxiliary.vae.": BEFORE,
        "auxiliary.siglip.": BEFORE,
        "vae_projector.": "of references as part of the condition, which the released data never shows",
    },
}
# what is trained, and has no gradient in some step or in any
PROBE = {"probe.": "what the vision encoder alone is trained by, in the first steps, which are left out here"}
UNUSED = {
    "metaquery-nano-mllm": PROBE,
    "uniworld-nano": {
        "denoiser.pooled_embed.fc1.weight": "of CLIP's embedding, which is zeros: the recipe's `captioned` is false"
    },
}


def needs(options: Mapping[str, Any]) -> dict[str, str]:
    """The recipes whose releases a recipe's options name, by the option."""
    named = {
        key: value.split("/") for key, value in options.items() if isinstance(value, str) and value.startswith("runs/")
    }
    return {key: parts[1] for key, parts in named.items()}


@pytest.fixture(scope="module")
def objective(tmp_path_factory):
    """The task of a recipe by its name, around untrained parts, in float32."""
    home = tmp_path_factory.mktemp("runs")

    @functools.cache
    def made(name: str):
        recipe = read_recipe(RECIPES / f"{name}.yaml")
        options = {key: OPTIONS.get(key, value) for key, value in recipe.options.items()}
        options |= {key: str(released(other)) for key, other in needs(options).items()}
        return build_task(dataclasses.replace(recipe, options=options, batch_size=SAMPLES, precision="float32"))

    @functools.cache
    def released(name: str) -> Path:
        folder = home / name
        folder.mkdir()
        with torch.no_grad():
            task = made(name)
            task.model.eval()
            task.save(folder)
        return folder

    return made


@functools.cache
def recipes() -> list[str]:
    """The recipes of the bundled models, and before them those that they need."""
    found: dict[str, None] = {}

    def walk(name: str) -> None:
        for other in needs(read_recipe(RECIPES / f"{name}.yaml").options).values():
            walk(other)
        found[name] = None

    for name in BUNDLED:
        walk(name)
    return list(found)


def gradients(objective) -> dict[str, bool]:
    """Whether each trained parameter has a gradient that is finite and not all zeros, after one step's losses."""
    generator = torch.Generator().manual_seed(0)
    objective.model.train()
    with torch.no_grad():
        for p in objective.model.parameters():  # what begins at zero would hide what lies before it
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    losses = mean_losses(objective.losses(objective.batch(0)))
    assert losses.keys() <= set(objective.loss_names) and all(torch.isfinite(x) for x in losses.values())
    torch.stack([x.float() for x in losses.values()]).sum().backward()
    trained = {name: p.grad for name, p in objective.model.named_parameters() if p.requires_grad}
    objective.model.zero_grad()
    return {
        name: grad is not None and bool(grad.any()) and bool(grad.isfinite().all()) for name, grad in trained.items()
    }


@pytest.mark.parametrize("name", recipes())
def test_every_trained_parameter_gets_a_gradient(objective, name):
    task = objective(name)
    without = [key for key, learns in gradients(task).items() if not learns]
    unused = UNUSED.get(name, {})
    assert [key for key in without if not key.startswith(tuple(unused))] == []
    assert all(any(key.startswith(one) for key in without) for one in unused), "take what learns out of UNUSED"


@pytest.mark.parametrize("name", BUNDLED)
def test_what_is_frozen_is_named(objective, name):
    model = objective(name).model
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    named = FROZEN.get(name, {})
    assert [key for key in frozen if not key.startswith(tuple(named))] == []
    for beginning in named:
        parts = [p.requires_grad for key, p in model.named_parameters() if key.startswith(beginning)]
        assert parts and not any(parts), f"{beginning} is not frozen, or not there: correct FROZEN"


@pytest.mark.parametrize("name", BUNDLED)
def test_a_recipe_makes_the_bundled_model(objective, name):
    """The same parameters, of the same shapes, as what is shipped; a table of words may have another length."""
    made, bundled = objective(name).model, unimm.load(name)
    shapes = {key: tuple(x.shape) for key, x in made.state_dict().items()}
    theirs = {key: tuple(x.shape) for key, x in bundled.state_dict().items()}
    # the task head is trained after the rest, by another recipe; the alignment head is no part of a release
    apart = ("task_head.", "alignment_head.")
    assert {key for key in shapes.keys() ^ theirs.keys() if not key.startswith(apart)} == set()
    assert {key for key in shapes.keys() & theirs.keys() if shapes[key][1:] != theirs[key][1:]} == set()
