"""The KL autoencoder's two released layouts: FLUX's own, whose names are ours, and diffusers' AutoencoderKL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch

from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import load_weights, read_shapes, weight_files
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig

FLUX_KEY_MAP: KeyMap = {"{*}": "{*}"}
FLUX_WEIGHT_FILES = ("ae.safetensors", "model.safetensors")
DIFFUSERS_WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
)
# the middle's attention: our names, diffusers', and those before its version 0.18
ATTENTION_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
LEGACY_ATTENTION_NAMES = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def kl_diffusers_key_map(
    config: AutoencoderKLConfig, *, attention: Mapping[str, str] = ATTENTION_NAMES
) -> dict[str, str]:
    """The key table of diffusers' layout. It numbers the decoder's levels from the coarsest, we from the finest."""
    widths, last = config.widths, len(config.widths) - 1
    changes = [fine != coarse for fine, coarse in pairwise(widths)]
    table = _level_key_map("encoder.down_blocks.{}", "encoder.down.{}", "down", shortcut=any(changes), scales=last > 0)
    for level in range(last + 1):
        theirs, ours, changed = (
            f"decoder.up_blocks.{last - level}",
            f"decoder.up.{level}",
            level < last and changes[level],
        )
        table |= _level_key_map(theirs, ours, "up", shortcut=changed, scales=level > 0)
    for side in ("encoder", "decoder"):
        table |= {f"{side}.mid_block.resnets.{i}.{{}}.{{}}": f"{side}.mid.block_{i + 1}.{{}}.{{}}" for i in range(2)}
        middle = f"{side}.mid_block.attentions.0"
        table |= {f"{middle}.group_norm.{{}}": f"{side}.mid.attn_1.norm.{{}}"}
        table |= {
            f"{middle}.{theirs}.{{}}": f"{side}.mid.attn_1.{ours}.{{}}[...]" for ours, theirs in attention.items()
        }
        table |= {f"{side}.conv_norm_out.{{}}": f"{side}.norm_out.{{}}"}
        table |= {f"{side}.{name}.{{}}": f"{side}.{name}.{{}}" for name in ("conv_in", "conv_out")}
    if config.quant_convs:
        table |= {"quant_conv.{}": "quant_conv.{}", "post_quant_conv.{}": "post_quant_conv.{}"}
    return table


def _level_key_map(theirs: str, ours: str, way: str, *, shortcut: bool, scales: bool) -> dict[str, str]:
    """The rows of a level; those that no key would meet are left out."""
    short = {f"{theirs}.resnets.{{}}.conv_shortcut.{{}}": f"{ours}.block.{{}}.nin_shortcut.{{}}"}
    scale = {f"{theirs}.{way}samplers.0.conv.{{}}": f"{ours}.{way}sample.conv.{{}}"}
    rows = {f"{theirs}.resnets.{{}}.{{}}.{{}}": f"{ours}.block.{{}}.{{}}.{{}}"}
    return (short if shortcut else {}) | (scale if scales else {}) | rows


def load_autoencoder_kl(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AutoencoderKL:
    """An autoencoder from its folder in either layout, strictly, in evaluation mode.

    The config is vae_config.json or config.json, in FLUX's words or in diffusers', or a section of a BAGEL's; without one the
    folder holds FLUX.1's ae.safetensors. Raises ValueError for another class's config, CheckpointError for weights that do
    not fit it.
    """
    named = [path for name in ("vae_config.json", "config.json") if (path := folder / name).exists()]
    files = json.loads(named[0].read_text()) if named else {}
    files = files.get("vae_config", files)
    foreign = "block_out_channels" in files or "_class_name" in files
    config = AutoencoderKLConfig.from_diffusers(files) if foreign else AutoencoderKLConfig.from_json(files)
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    paths = weight_files(folder, DIFFUSERS_WEIGHT_FILES if foreign else FLUX_WEIGHT_FILES)
    table = FLUX_KEY_MAP
    if foreign:
        old = any(".attentions.0.query." in key for key in read_shapes(paths))
        table = kl_diffusers_key_map(config, attention=LEGACY_ATTENTION_NAMES if old else ATTENTION_NAMES)
    load_weights(vae, paths, table, dtype=dtype, device=torch.device(device))
    return vae.eval()
