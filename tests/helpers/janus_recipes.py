"""Small recipes of Janus for the tests, around untrained parts of small numbers."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.paths import RECIPES
from unimm.encoders.siglip import SiglipNaViT, navit_config_from_json
from unimm.tokenizers.semantic_vq import SemanticBranch, SemanticBranchConfig
from unimm.tokenizers.vq import VQConfig, VQModel
from unimm.training.config import TrainConfig, read_recipe
from unimm.training.tasks import bagel as shapes
from unimm.training.tasks.vq import save_vq

LANGUAGE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48)
VISION = dict(width=32, layers=2, heads=2, mlp_ratio=1.5)
VIT = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, patch_size=16, image_size=128
)
# an image of the little world is 4 x 4 codes
CODES = VQConfig(
    width=32, channel_multipliers=(1, 1, 1, 1, 1), n_res_blocks=1, latent_channels=32, n_codes=48, code_dim=4
)
BRANCH = SemanticBranchConfig(code_dim=4, dim=32, n_layers=1, n_heads=2, mlp_dim=48, side=8, out_dim=24)

# the text model of every test, with less text to learn from
text_model = functools.cache(functools.partial(shapes.train_tokenizer, lines=2000))


def parts(folder: Path) -> Path:
    """Untrained tokenizers and a ViT, as their recipes write them."""
    torch.manual_seed(0)
    vq, branch = VQModel(CODES), SemanticBranch(BRANCH)
    # codes spread out, so that images differ in theirs
    torch.nn.init.normal_(vq.quantize.embedding.weight)
    save_vq(vq, folder, torch.float32)
    save_file(branch.state_dict(), folder / "semantic.safetensors")
    (folder / "semantic_config.json").write_text(json.dumps(BRANCH.to_json()))
    save_file(SiglipNaViT(navit_config_from_json(VIT)).state_dict(), folder / "vision.safetensors")
    return folder


def small(name: str | Path, folder: Path, *, options: dict | None = None, **changes) -> TrainConfig:
    """A recipe, given by its name or its path, with small numbers, around the parts in a folder."""
    full = read_recipe(name if isinstance(name, Path) else RECIPES / f"{name}.yaml")
    model = copy.deepcopy(dict(full.model))
    model["language"] |= LANGUAGE
    model["vision"] |= VISION
    model["gen_head_dim"] = 32
    # untrained models do not stop by themselves
    model["generation"]["talk"] |= {"max_tokens": 4}
    # tasks once each: a recipe's ratios are tested as they are read
    tasks = dict.fromkeys(full.options["tasks"], 1)
    ours = {"tasks": tasks, "vq": str(folder), "vit": str(folder), "compile": False}
    ours |= {"semantic": str(folder)} if "semantic" in full.options else {}
    numbers = dict(batch_size=len(tasks), steps=2, precision="float32", save_every=100, sample_every=100, log_every=1)
    return dataclasses.replace(full, model=model, options=full.options | ours | (options or {}), **(numbers | changes))
