"""What is refused while a folder's module is built: many more parameters than its weights hold, tensors that no memory
holds, and sizes that weights of other axes tell."""

import json

import pytest
import torch
from helpers.config_edits import edited, link_copy
from helpers.paths import GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn

from unimm.checkpoint.building import building
from unimm.checkpoint.contents import CheckpointError
from unimm.checkpoint.hub import BUNDLED_FOLDER
from unimm.models.registry import family_class, load


def test_a_module_of_many_more_parameters_than_the_weights_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("unimm.checkpoint.building.UNSUSPICIOUS", 100)
    save_file({f"{i}": torch.zeros(1) for i in range(3)}, tmp_path / "model.safetensors")
    made = (nn.LayerNorm(1, device="meta") for _ in range(10**6))
    with pytest.raises(CheckpointError, match=f"{tmp_path} describe more than .* hold 3 tensors"), building(tmp_path):
        nn.ModuleList(made)
    # another folder, and what is built outside, have their own count
    with building(tmp_path):
        nn.ModuleList(nn.LayerNorm(1, device="meta") for _ in range(50))
    nn.ModuleList(nn.LayerNorm(1, device="meta") for _ in range(51))


def test_a_tensor_that_is_too_large_is_named_with_the_folder(tmp_path):
    with (
        pytest.raises(ValueError, match=f"{tmp_path}: the configs describe a tensor that is too large"),
        building(tmp_path),
    ):
        nn.Linear(2**31 - 1, 2**31 - 1, device="meta")
    with pytest.raises(RuntimeError, match="negative"), building(tmp_path):
        torch.empty(-1)


@pytest.mark.parametrize("n", [10**6, 10**12])
@pytest.mark.parametrize(
    ("case", "file", "path"),
    [
        ("bagel/dev", "llm_config.json", ("num_hidden_layers",)),
        ("bagel/dev", "vit_config.json", ("num_hidden_layers",)),
        ("bagel/dev", "config.json", ("vae_config", "num_res_blocks")),
        ("janus/flow_dev", "config.json", ("language_config", "num_hidden_layers")),
        ("janus/flow_dev", "config.json", ("vision_gen_dec_config", "params", "layers_in_middle")),
        ("metaquery/dev", "config.json", ("connector_num_hidden_layers",)),
        ("uniworld/dev", "config.json", ("denoise_tower", "denoiser_config", "num_single_layers")),
    ],
)
def test_a_million_layers(tmp_path, case, file, path, n):
    folder = tmp_path / "model"
    link_copy(GOLDEN / case, folder)
    (folder / file).write_text(json.dumps(edited(json.loads((folder / file).read_text()), path, n)))
    with pytest.raises(ValueError, match=f"{path[-1]} {n} in {folder / file}"), torch.device("meta"):
        family_class(folder).from_folder(folder)


@pytest.mark.parametrize(
    ("case", "file", "key", "edit"),
    [
        ("bagel/dev", "ema.safetensors", "latent_pos_embed.pos_embed", lambda x: x[0, 0]),
        ("bagel/dev", "ema.safetensors", "latent_pos_embed.pos_embed", lambda x: x[:-1]),
        ("bagel/dev", "ema.safetensors", "vit_pos_embed.pos_embed", lambda x: x[:0]),
        ("uniworld/dev", "model.safetensors", "denoise_tower.denoise_projector.0.bias", lambda x: x[0]),
        ("uniworld/dev", "model.safetensors", "denoise_tower.siglip_projector.0.weight", lambda x: x.flatten()),
        ("uniworld/dev", "task_head_final.safetensors", "0.bias", lambda x: x[:0]),
        ("metaquery/dev", "model.safetensors", "model.mllm_backbone.model.embed_tokens.weight", lambda x: x[0]),
    ],
)
def test_sizes_of_tensors_with_other_axes(tmp_path, case, file, key, edit):
    folder = tmp_path / "model"
    link_copy(GOLDEN / case, folder)
    weights = load_file(folder / file)
    (folder / file).unlink()
    save_file(weights | {key: edit(weights[key]).clone()}, folder / file)
    with pytest.raises(CheckpointError, match=f"{folder}.*{key}"), torch.device("meta"):
        family_class(folder).from_folder(folder)


@pytest.mark.parametrize("name", ["janus-nano", "janusflow-nano"])
def test_images_of_another_size_than_the_encoder_takes(tmp_path, name):
    folder = tmp_path / "model"
    link_copy(BUNDLED_FOLDER / name, folder)
    rules = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(rules | {"image_size": 2 * rules["image_size"]}))
    with pytest.raises(ValueError, match=f"images of {2 * rules['image_size']} pixels .* {rules['image_size']}"):
        load(folder)
