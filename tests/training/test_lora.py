"""A recipe's `lora`: the adapter alone is trained, kept in checkpoints, released; a resumed run is the unbroken one."""

import dataclasses

import pytest
import torch
from helpers.paths import RECIPES
from safetensors.torch import load_file

from examples.data import make
from unimm import Bagel
from unimm.training.config import read_recipe
from unimm.training.tasks.base import build_task
from unimm.training.trainer import train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = make.make_imagefolder(tmp_path_factory.mktemp("data"))
    settings = [
        f"data.groups={{images: {{paths: [{folder}]}}}}",
        "data.lanes=1",
        "packing={expected_tokens: 60, max_tokens: 120, max_tokens_per_sample: 120, buffer_size: 2}",
        "lora={rank: 4, alpha: 8.0, targets: [gen], dropout: 0.1}",
        "options.sample_prompts=[]",
        *("steps=3", "save_every=2", "log_every=1", "warmup_steps=0", "lr=1e-2"),
    ]
    return read_recipe(RECIPES / "bagel-nano-finetune.yaml", settings=settings)


def run(recipe, out, **options):
    return train(build_task(recipe), recipe, out, workers=0, **options)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert run(recipe, out) == 3
    return out


def test_the_adapter_alone_is_kept_and_released(whole):
    kept = load_file(whole / "checkpoints" / "00000003" / "model.safetensors")
    assert kept and all(".experts.gen." in name and ".lora_" in name for name in kept)
    release = {path.name for path in (whole / "release").iterdir() if not path.name.startswith(".")}
    assert release == {"adapter_model.safetensors", "adapter_config.json"}
    # the averaged adapter, which is not the one that is trained
    average = load_file(whole / "checkpoints" / "00000003" / "average.safetensors")
    model = Bagel.from_pretrained("bagel-nano")
    model.load_adapter(whole / "release")
    for name, update in model.adapters.updates("default").items():
        assert torch.equal(update.a, average[f"{name}.lora_A.default.weight"])
        assert torch.equal(update.b, average[f"{name}.lora_B.default.weight"])
        assert update.b.any()
        assert update.scale == 2.0


def test_a_resumed_run_is_the_unbroken_one(recipe, whole, tmp_path):
    run(dataclasses.replace(recipe, steps=2), tmp_path)
    assert run(recipe, tmp_path, resume=True) == 3
    for name in ("checkpoints/00000003/model.safetensors", "release/adapter_model.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(whole / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[key]) for key, x in ours.items())


def test_a_run_starts_from_the_adapter_of_another_and_not_from_a_release(recipe, whole, tmp_path):
    run(dataclasses.replace(recipe, steps=1, lr=1e-12), tmp_path, init=whole)
    ours = load_file(tmp_path / "checkpoints" / "00000001" / "model.safetensors")
    theirs = load_file(whole / "checkpoints" / "00000003" / "average.safetensors")
    assert all(torch.allclose(x, theirs[key], rtol=0, atol=1e-10) for key, x in ours.items())
    with pytest.raises(ValueError, match="a release, for a recipe with lora: expected a run of such a recipe"):
        run(recipe, tmp_path / "other", init="bagel-nano")


def test_what_does_not_fit_is_refused_before_training(recipe):
    wrong = dataclasses.replace(recipe.lora, targets=("q_proj",))
    with pytest.raises(ValueError, match="got the target 'q_proj': expected groups of linears, und, und.attention"):
        build_task(dataclasses.replace(recipe, lora=wrong))
    whole_models = read_recipe(RECIPES / "bagel-nano-vit.yaml", settings=["lora={rank: 4, alpha: 8.0, targets: [gen]}"])
    with pytest.raises(ValueError, match="got lora for the task 'vit', which trains no whole model"):
        build_task(whole_models)
    with pytest.raises(ValueError, match="got 0 for lora.rank in"):
        read_recipe(RECIPES / "bagel-nano-vit.yaml", settings=["lora={rank: 0, alpha: 8.0, targets: [gen]}"])


def test_a_model_that_is_no_release_has_no_adapter(recipe):
    made = dataclasses.replace(recipe, task="helpers.bagel_record_toys:ToyBagelTask", model={})
    with pytest.raises(ValueError, match="a model that is no release: give model.from_pretrained"):
        build_task(made)
