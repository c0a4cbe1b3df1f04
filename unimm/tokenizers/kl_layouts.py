"""The KL autoencoder's two released layouts: FLUX's own, whose names are ours, and diffusers' AutoencoderKL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch

from unimm.checkpoint.keymap import KeyMap, Rename, Squeeze, renames
from unimm.checkpoint.load import keep_weights_open, load_weights, read_shapes, weight_files
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig

FLUX_KEY_MAP = KeyMap(Rename("{*}", "{*}"))
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


def kl_diffusers_key_map(config: AutoencoderKLConfig, *, attention: Mapping[str, str] = ATTENTION_NAMES) -> KeyMap:
    """The key map of diffusers' layout. It numbers the decoder's levels from the coarsest, we from the finest."""
    widths = config.widths
    last = len(widths) - 1
    changes = [fine != coarse for fine, coarse in pairwise(widths)]
    names = _level_names("encoder.down_blocks.{}", "encoder.down.{}", "down", shortcut=any(changes), scales=last > 0)
    for level in range(last + 1):
        released, ours = f"decoder.up_blocks.{last - level}", f"decoder.up.{level}"
        shortcut = level < last and changes[level]
        names |= _level_names(released, ours, "up", shortcut=shortcut, scales=level > 0)
    squeezed = KeyMap()
    for side in ("encoder", "decoder"):
        names |= {f"{side}.mid_block.resnets.{i}.{{}}.{{}}": f"{side}.mid.block_{i + 1}.{{}}.{{}}" for i in range(2)}
        names |= {f"{side}.mid_block.attentions.0.group_norm.{{}}": f"{side}.mid.attn_1.norm.{{}}"}
        names |= {f"{side}.conv_norm_out.{{}}": f"{side}.norm_out.{{}}"}
        names |= {f"{side}.{name}.{{}}": f"{side}.{name}.{{}}" for name in ("conv_in", "conv_out")}
        # linears in diffusers, 1 x 1 convolutions here
        squeezed += KeyMap(
            *(
                Squeeze(f"{side}.mid_block.attentions.0.{released}.{{}}", f"{side}.mid.attn_1.{ours}.{{}}")
                for ours, released in attention.items()
            )
        )
    if config.quant_convs:
        names |= {"quant_conv.{}": "quant_conv.{}", "post_quant_conv.{}": "post_quant_conv.{}"}
    return squeezed + renames(names)


def _level_names(released: str, ours: str, way: str, *, shortcut: bool, scales: bool) -> dict[str, str]:
    """{released name: our name} of a level, without the parts that it lacks."""
    names = {f"{released}.resnets.{{}}.conv_shortcut.{{}}": f"{ours}.block.{{}}.nin_shortcut.{{}}"} if shortcut else {}
    if scales:
        names[f"{released}.{way}samplers.0.conv.{{}}"] = f"{ours}.{way}sample.conv.{{}}"
    return names | {f"{released}.resnets.{{}}.{{}}.{{}}": f"{ours}.block.{{}}.{{}}.{{}}"}


@keep_weights_open()
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
