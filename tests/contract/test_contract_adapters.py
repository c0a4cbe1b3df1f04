"""The contract of adapters, for every family: one that is new changes nothing, a trained one is saved alone and loaded,
merging it changes outputs by rounding alone, a merged model is a release, and PEFT itself reads the files."""

import functools
import json

import numpy as np
import pytest
import torch
from helpers.adapters import move_trained
from helpers.toys import picture
from safetensors.torch import load_file
from torch import nn
from walk import BUNDLED

import unimm
from unimm import TextSampling
from unimm.adapters.config import AdapterConfig, adaptable_linears
from unimm.checkpoint.save import released_state_dict

# the largest difference of a pixel, of 255, that merging may make: sums in another order, and a step of rounding
ROUNDING = 1
each_family = pytest.mark.parametrize("name", BUNDLED)


@functools.cache
def bundled(name: str) -> unimm.UnifiedModel:
    """A model for all tests here, which leave it as it was."""
    return unimm.load(name)


def everything(model) -> AdapterConfig:
    """An adapter of all that the family allows, as far as the model has it: a part may be left out, as Show-o's CLIP."""
    found = {
        group: patterns for group, patterns in model.LORA_TARGETS.items() if adaptable_linears(model, {group: patterns})
    }
    groups = dict.fromkeys(group.partition(".")[0] for group in found)
    return AdapterConfig(rank=2, alpha=4, targets=tuple(groups), dropout=0.1)


def outputs(model) -> tuple[np.ndarray, str]:
    """An image from an image and a prompt, and an answer about an image."""
    options = model.supported_options(steps=1 if model.supports_steps else None)
    image = model.generate("a red circle", images=picture(), seed=1, **options).image
    answer = model.understand(picture(), "what is it", text_sampling=TextSampling(max_tokens=3))
    return np.asarray(image).astype(int), answer


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


@each_family
def test_an_adapter_is_trained_saved_loaded_merged_and_released(name, tmp_path):
    model = bundled(name)
    before = state_of(model)
    image, _ = outputs(model)
    model.add_adapter(everything(model))
    assert {p.requires_grad for key, p in model.named_parameters() if "lora_" not in key} == {False}
    assert all(p.requires_grad for key, p in model.named_parameters() if "lora_" in key)
    assert not any(module.training for module in model.modules())
    move_trained(model, std=0.02)
    adapted, adapted_answer = outputs(model)
    assert abs(adapted - image).max() > 10 * ROUNDING
    updates = model.adapters.updates("default")
    model.save_adapter(tmp_path / "adapter")
    model.unload_adapter()
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(x, now[key]) for key, x in before.items())
    assert all(p.requires_grad for p in model.parameters())

    merged = unimm.load(name)
    merged.load_adapter(tmp_path / "adapter", name="mine")
    again = merged.adapters.updates("mine")
    assert again.keys() == updates.keys()
    assert all(torch.equal(x.a, updates[key].a) and torch.equal(x.b, updates[key].b) for key, x in again.items())
    assert {x.scale for x in again.values()} == {2.0}
    merged.merge_adapter()
    assert merged.state_dict().keys() == before.keys()
    merged_image, merged_answer = outputs(merged)
    assert abs(merged_image - adapted).max() <= ROUNDING and merged_answer == adapted_answer
    merged.save_pretrained(tmp_path / "merged")
    theirs = unimm.load(tmp_path / "merged").state_dict()
    assert all(torch.equal(x, theirs[key]) for key, x in merged.state_dict().items())


@each_family
def test_every_linear_that_may_be_adapted_is_called(name):
    """No verb reads its weight past the layer, where an adapter would do nothing."""
    model = bundled(name)
    linears = adaptable_linears(model, model.LORA_TARGETS)
    called: set[str] = set()
    hooks = [linear.register_forward_hook(lambda *_, key=key: called.add(key)) for key, linear in linears.items()]
    outputs(model)
    for hook in hooks:
        hook.remove()
    assert linears.keys() - called <= UNMET.get(name, set())


# what no verb calls: of reference images as part of the condition, which the small model does not take
UNMET = {"uniworld-nano": {"vae_projector.fc1", "vae_projector.fc2"}}


@each_family
def test_peft_reads_what_is_saved_and_merges_the_same(name, tmp_path):
    """Onto linears of the released names alone, which is what the original code has."""
    from peft import PeftModel

    model = bundled(name)
    model.add_adapter(everything(model))
    move_trained(model, std=0.02)
    model.save_adapter(tmp_path)
    model.unload_adapter()
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in keys} == set(names)
    released = {}
    for key_map in model.original_key_maps():
        released |= released_state_dict(model, key_map)
    original = nn.Module()
    for key in names:
        weight = released[f"{key}.weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        add_at(original, key, linear)
    theirs = PeftModel.from_pretrained(original, tmp_path).merge_and_unload().state_dict()
    ours = unimm.load(name)
    ours.load_adapter(tmp_path)
    ours.merge_adapter()
    merged = {}
    for key_map in ours.original_key_maps():
        merged |= released_state_dict(ours, key_map)
    assert len(theirs) == len(names)
    for key, weight in theirs.items():
        assert torch.equal(weight, merged[key]), key
        assert not torch.equal(weight, released[key])


def add_at(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path, making what is above it."""
    *above, last = path.split(".")
    for part in above:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)


def test_an_adapter_of_another_family_is_refused(tmp_path):
    janus = bundled("janus-nano")
    janus.add_adapter(AdapterConfig(rank=2, alpha=4, targets=("decoder",)))
    janus.save_adapter(tmp_path)
    janus.unload_adapter()
    bagel = bundled("bagel-nano")
    with pytest.raises(ValueError, match="an adapter of a Janus: got it for a Bagel"):
        bagel.load_adapter(tmp_path)
    # of another library, which does not say what it is for
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": None}))
    with pytest.raises(ValueError, match="it is of a model of another size"):
        bagel.load_adapter(tmp_path)
    assert bagel.adapters is None or bagel.adapters.names == []
