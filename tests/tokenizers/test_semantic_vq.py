"""The semantic tokenizer: codes read causally, a teacher of either kind, a few steps of its recipe, the files it
writes."""

import dataclasses
import json

import pytest
import torch
from helpers.paths import RECIPES
from safetensors.torch import load_file, save_file

from unimm.encoders.siglip import SiglipNaViT, navit_config_from_json
from unimm.encoders.timm_vit import TimmEncoderConfig, TimmVisionEncoder
from unimm.tokenizers.semantic_vq import SemanticBranchConfig, SemanticVQ
from unimm.tokenizers.vq import VQConfig
from unimm.training.config import read_recipe
from unimm.training.losses import mean_losses
from unimm.training.tasks.base import build_task
from unimm.training.tasks.semantic_vq import load_teacher
from unimm.training.tasks.vq import init_vq, save_vq
from unimm.training.trainer import train

VIT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, patch_size=16, image_size=128
)
TIMM = dict(model_name="tiny", image_size=64, width=32, layers=1, heads=2, patch_size=16)
MODEL = dict(width=32, multipliers=[1, 1, 1], n_blocks=1, latent_channels=32, n_codes=32, code_dim=4)
BRANCH = dict(dim=32, n_layers=2, n_heads=2, mlp_dim=48, side=16)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    vq = VQConfig(width=32, channel_multipliers=(1, 2), n_res_blocks=1, latent_channels=32, n_codes=24, code_dim=4)
    branch = SemanticBranchConfig(code_dim=4, out_dim=6, **BRANCH | {"side": 5})
    return SemanticVQ(vq, branch).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe with small numbers, around an untrained ViT."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    save_file(SiglipNaViT(navit_config_from_json(VIT)).state_dict(), folder / "vision.safetensors")
    full = read_recipe(RECIPES / "janus-nano-semantic.yaml")
    model = {"vq": MODEL, "branch": BRANCH, "teacher": VIT}
    options = {**full.options, "scored_scenes": 4, "teacher": str(folder), "init_from": None}
    return dataclasses.replace(
        full,
        model=model,
        options=options,
        steps=6,
        batch_size=2,
        precision="float32",
        warmup_steps=0,
        lr=3e-3,
        ema_decay=0.0,
    )


def test_a_code_is_read_with_those_before_it(small):
    ids = torch.randint(24, (2, 15), generator=torch.Generator().manual_seed(0))
    features = small.features(ids, grid=(5, 3))
    assert features.shape == (2, 15, 6)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 24
    again = small.features(changed, grid=(5, 3))
    torch.testing.assert_close(again[0, :7], features[0, :7])
    assert (again[0, 7:] != features[0, 7:]).any(-1).all()
    torch.testing.assert_close(again[1], features[1])
    # where a code lies counts, and not only when it comes
    assert not torch.allclose(small.features(ids, grid=(3, 5)), features)
    torch.testing.assert_close(small.features(ids[1:], grid=(5, 3)), features[1:], rtol=1e-4, atol=1e-5)


def test_wrong_branches(small):
    with pytest.raises(ValueError, match="holds at most 5x5"):
        small.features(torch.zeros(1, 6).long(), grid=(6, 1))
    files = small.branch.config.to_json()
    assert SemanticBranchConfig.from_json(json.loads(json.dumps(files))) == small.branch.config
    with pytest.raises(ValueError, match="expected some of code_dim"):
        SemanticBranchConfig.from_json({**files, "depth": 3})
    with pytest.raises(ValueError, match="multiple of n_heads"):
        dataclasses.replace(small.branch.config, n_heads=3)
    with pytest.raises(ValueError, match="codes of 4, expected 8"):
        SemanticVQ(VQConfig(), small.branch.config)


def test_teachers_see_as_their_encoders(tmp_path):
    torch.manual_seed(0)
    tower = TimmVisionEncoder(TimmEncoderConfig.from_json(TIMM)).eval()
    for p in tower.parameters():  # built to be loaded, so it holds anything
        torch.nn.init.normal_(p, std=0.1)
    save_file(tower.trunk.state_dict(), tmp_path / "vision.safetensors")
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    seen = load_teacher(TIMM, tmp_path)
    assert seen.out_dim == 32 and seen(image).shape == (2, 32, 4, 4)
    torch.testing.assert_close(seen(image).flatten(2).mT, tower(image))
    save_file(SiglipNaViT(navit_config_from_json(VIT)).state_dict(), tmp_path / "vision.safetensors")
    seen = load_teacher(VIT, tmp_path)
    assert seen.out_dim == 32 and seen(image[..., :32]).shape == (2, 32, 4, 2)
    torch.testing.assert_close(seen(image[1:]), seen(image)[1:], rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in seen.parameters())
    with pytest.raises(ValueError, match=r"no vision.safetensors in .*run `unimm train bagel-nano-vit"):
        load_teacher(VIT, tmp_path / "none")


def test_a_code_is_taught_the_patch_it_lies_in(recipe):
    objective = build_task(recipe)
    image = objective.batch(0).image
    seen = objective.teacher_features(image, (16, 16)).unflatten(1, (16, 16))
    patches = objective.teacher(image)
    assert patches.shape == (2, 32, 4, 4)
    torch.testing.assert_close(seen[:, 7, 13], patches[:, :, 1, 3])


def test_what_is_said_teaches_the_encoder(recipe):
    objective = build_task(recipe)
    mean_losses(objective.losses(objective.batch(0)))["cosine"].backward()
    grads = {name: p.grad is not None and bool(p.grad.any()) for name, p in objective.model.named_parameters()}
    assert all(given for name, given in grads.items() if name.startswith("branch."))
    assert grads["vq.quant_conv.weight"] and not grads["vq.decoder.conv_out.weight"]
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_steps_teach_and_are_written(recipe, tmp_path):
    objective = build_task(recipe)
    before = {name: loss.item() for name, loss in mean_losses(objective.losses(objective.batch(0))).items()}
    assert set(before) == set(objective.loss_names) - {"entropy"}
    train(objective, recipe, tmp_path, workers=0)
    after = {name: loss.item() for name, loss in mean_losses(objective.losses(objective.batch(0))).items()}
    assert all(after[name] < before[name] for name in ("l1", "mse", "cosine", "features")), (before, after)
    release = tmp_path / "release"
    files = json.loads((release / "vq_config.json").read_text())
    branch = SemanticBranchConfig.from_json(json.loads((release / "semantic_config.json").read_text()))
    model = SemanticVQ(VQConfig.from_json(files["params"]), branch)
    model.vq.load_state_dict(load_file(release / "vq.safetensors"))
    model.branch.load_state_dict(load_file(release / "semantic.safetensors"))
    report = json.loads((release / "report.json").read_text())
    assert report["scenes"] == 4 and -1 <= report["cosine"] <= 1 and -1 <= report["cosine_blind"] <= 1


def test_starts_from_a_trained_tokenizer(recipe, tmp_path):
    torch.manual_seed(5)
    vq = init_vq(build_task(recipe).model.vq.config)
    save_vq(vq, tmp_path, torch.float32)
    started = build_task(dataclasses.replace(recipe, options={**recipe.options, "init_from": str(tmp_path)})).model.vq
    assert all(torch.equal(x, started.state_dict()[name]) for name, x in vq.state_dict().items())
