"""A small recipe of every family, around untrained parts: batches of one or two samples, which differ in what they
hold."""

import dataclasses
import functools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers import metaquery_toys as toys
from helpers.metaquery_training_toys import DENOISER
from helpers.paths import RECIPES
from unimm.encoders.siglip import SiglipNaViT, navit_config_from_json
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig
from unimm.tokenizers.vq import VQConfig, VQModel
from unimm.training.config import TrainConfig, read_recipe
from unimm.training.init import train_tokenizer
from unimm.training.tasks import bagel, emu3_start, janus, janusflow, show_o
from unimm.training.tasks.base import build_task
from unimm.training.tasks.vq import save_vq

LLM = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48)
VIT = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, patch_size=16, image_size=128
)
TOWER = dict(width=32, layers=2, heads=2, mlp_ratio=1.5)
CODES = VQConfig(
    width=32, channel_multipliers=(1, 1, 1, 1, 1), n_res_blocks=1, latent_channels=32, n_codes=48, code_dim=4
)
FLUX = dict(
    in_channels=16, num_layers=1, num_single_layers=2, num_attention_heads=2, attention_head_dim=12,
    axes_dims_rope=[4, 4, 4], joint_attention_dim=20, pooled_projection_dim=6, guidance_embeds=True,
)  # fmt: skip
# names of recipes NAME-nano
FAMILIES = ("bagel", "janus", "janusflow", "metaquery", "uniworld", "showo", "emu3")
# numbers of the image tokenizers of the last two, over those of their recipes
TOKENIZERS = {
    "showo": dict(width=32, multipliers=[1, 1, 1, 1], bits=5),
    "emu3": dict(width=32, multipliers=[1, 1, 1, 1, 1], n_codes=48, attention_levels=[4]),
}

quick_tokenizer = functools.cache(functools.partial(train_tokenizer, lines=500))


def use_quick_tokenizers(set_attribute=setattr) -> None:
    """Let tasks make tokenizers of less text."""
    set_attribute(show_o, "train_bpe_tokenizer", functools.partial(show_o.train_bpe_tokenizer, lines=500))
    quick_emu3 = functools.partial(emu3_start.train_emu3_tokenizer, lines=500)
    set_attribute(emu3_start, "train_emu3_tokenizer", quick_emu3)
    for task in (bagel, janus, janusflow):
        set_attribute(
            task, "train_tokenizer", lambda size, *, special_tokens, extra=(): quick_tokenizer(
                size, special_tokens=tuple(special_tokens), extra=tuple(extra)
            )
        )  # fmt: skip


def save_parts(folder: Path) -> None:
    """The trained parts that the recipes begin from, untrained."""
    torch.manual_seed(0)
    for channels in (4, 8):
        (folder / f"vae{channels}").mkdir(parents=True)
        vae = AutoencoderKLConfig(
            width=32,
            channel_multipliers=(1, 1, 1, 1),
            n_res_blocks=1,
            latent_channels=channels,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        save_file(AutoencoderKL(vae).state_dict(), folder / f"vae{channels}/ae.safetensors")
        (folder / f"vae{channels}/vae_config.json").write_text(json.dumps(vae.to_json()))
    for layers in (2, 3):
        (folder / f"vit{layers}").mkdir()
        vit = SiglipNaViT(navit_config_from_json(VIT | {"num_hidden_layers": layers}))
        save_file(vit.state_dict(), folder / f"vit{layers}/vision.safetensors")
    vq = VQModel(CODES)
    torch.nn.init.normal_(vq.quantize.embedding.weight)
    (folder / "vq").mkdir()
    save_vq(vq, folder / "vq", torch.float32)
    tokens = dict(special_tokens=toys.SPECIAL_TOKENS)
    toys.save_mllm(folder / "mllm", train_tokenizer(400, lines=500, **tokens))
    toys.save_dcae(folder / "dcae")
    for name, numbers in TOKENIZERS.items():
        recipe = read_recipe(RECIPES / f"{name}-nano-vq.yaml")
        (folder / f"{name}-vq").mkdir()
        # few scenes that its error is measured on
        scored = {"scored_scenes": 2} if "scored_scenes" in recipe.options else {}
        small = dataclasses.replace(recipe, model=recipe.model | numbers, options=recipe.options | scored)
        build_task(small).save(folder / f"{name}-vq")


def small_recipes(folder: Path) -> dict[str, TrainConfig]:
    """A recipe a family, around the parts in a folder. Adam's epsilon is larger than what rounding moves gradients by."""
    full = {name: read_recipe(RECIPES / f"{name}-nano.yaml") for name in FAMILIES}
    sections = {name: {key: dict(part) for key, part in one.model.items() if isinstance(part, dict)}
                for name, one in full.items()}  # fmt: skip
    few = {"draw.one": 1, "answer.count": 1, "fact.forward": 1}
    edits = {"draw.one": 1, "edit.recolour": 1}
    janus_model = {**sections["janus"], "language": sections["janus"]["language"] | LLM | {"num_key_value_heads": 2},
                   "vision": sections["janus"]["vision"] | TOWER, "gen_head_dim": 32}  # fmt: skip
    flow_model = {**sections["janusflow"], "flow": {"width": 16, "blocks": 1},
                  "language": sections["janusflow"]["language"] | LLM | {"num_key_value_heads": 2},
                  "vision": sections["janusflow"]["vision"] | TOWER}  # fmt: skip
    flow_model["generation"] |= {"steps": 2}
    bagel_model = {**sections["bagel"], "llm": sections["bagel"]["llm"] | LLM,
                   "vit": sections["bagel"]["vit"] | VIT | {"num_hidden_layers": 2}}  # fmt: skip
    bagel_model["config"]["generation"] |= {"steps": 2}
    query_model = {"config": sections["metaquery"]["config"] | dict(num_metaqueries=5, connector_num_hidden_layers=1),
                   "denoiser": DENOISER, "scheduler": sections["metaquery"]["scheduler"]}  # fmt: skip
    world_model = {"generation": sections["uniworld"]["generation"] | {"steps": 2}, "hidden": {"vae_projector": 5},
                   "denoiser": FLUX,
                   "vision": {**sections["uniworld"]["vision"], **VIT, "num_hidden_layers": 1, "image_size": 64}}  # fmt: skip
    show_o_model = {"language": sections["showo"]["language"] | LLM | {"num_key_value_heads": 2}}
    emu3_model = {"language": sections["emu3"]["language"] | LLM,
                  "images": sections["emu3"]["images"] | {"spatial_factor": 16}}  # fmt: skip
    mllm = {"mllm": f"{folder}/mllm"}
    changes = {
        "bagel": (bagel_model, {"vae": f"{folder}/vae4", "vit": f"{folder}/vit2", "tasks": few | edits}, 1),
        "janus": (janus_model, {"vq": f"{folder}/vq", "vit": f"{folder}/vit3", "tasks": few}, 1),
        "janusflow": (flow_model, {"vae": f"{folder}/vae8", "vit": f"{folder}/vit3", "tasks": few,
                                   "timesteps_per_image": 2, "alignment_block": 1}, 1),
        "metaquery": (query_model, {**mllm, "dcae": f"{folder}/dcae", "tasks": edits, "frozen": []}, 2),
        "uniworld": (world_model, {**mllm, "vae": f"{folder}/vae4", "vit": f"{folder}/vit3", "tasks": edits,
                                   "timesteps_per_image": 2, "alignment_block": 2}, 1),
        "showo": (full["showo"].model | show_o_model,
                  {"vq": f"{folder}/showo-vq", "tasks": {"draw.one": 1, "answer.count": 1}, "vocab_size": 300}, 1),
        "emu3": (full["emu3"].model | emu3_model,
                 {"vq": f"{folder}/emu3-vq", "tasks": few | edits, "n_ranks": 300}, 1),
    }  # fmt: skip
    numbers = dict(
        steps=3, schedule="constant",
        save_every=2, sample_every=100, log_every=1, precision="float32", warmup_steps=0, lr=3e-3, muon=(),
        eps=1e-4, cache=None,
    )  # fmt: skip
    weights = {name: one.loss_weights for name, one in full.items()}
    weights["uniworld"] = {**weights["uniworld"], "align": 0.5}
    return {
        name: dataclasses.replace(
            full[name],
            model=model,
            options=full[name].options | options | ({"compile": False} if "compile" in full[name].options else {}),
            loss_weights=weights[name],
            batch_size=size,
            **numbers,
        )
        for name, (model, options, size) in changes.items()
    }
