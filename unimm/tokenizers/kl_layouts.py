"""The KL autoencoder's two released layouts: FLUX's own, whose names are ours, and diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from unimm.checkpoint.keymap import KeyMap, Rename, Squeeze, renames

FLUX_KEY_MAP = KeyMap(Rename("{*}", "{*}"))
FLUX_WEIGHT_FILES = ("ae.safetensors", "model.safetensors")
# the middle's attention: our names, diffusers', and those before its version 0.18
ATTENTION_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
LEGACY_ATTENTION_NAMES = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def in_flux_layout(names: Collection[str]) -> bool:
    """Whether released tensors have the names of FLUX's ae.safetensors."""
    return not any(name.startswith("encoder.down_blocks.") for name in names)


def kl_key_map(names: Collection[str], widths: Sequence[int], *, quant_convs: bool) -> KeyMap:
    """The key map of released tensors of these names, in whichever layout they are."""
    if in_flux_layout(names):
        return FLUX_KEY_MAP
    legacy = any(".attentions.0.query." in name for name in names)
    attention = LEGACY_ATTENTION_NAMES if legacy else ATTENTION_NAMES
    return kl_diffusers_key_map(widths, quant_convs=quant_convs, attention=attention)


def kl_diffusers_key_map(
    widths: Sequence[int], *, quant_convs: bool, attention: Mapping[str, str] = ATTENTION_NAMES
) -> KeyMap:
    """The key map of diffusers' layout. It numbers the decoder's levels from the coarsest, we from the finest."""
    last = len(widths) - 1
    changes = [fine != coarse for fine, coarse in pairwise(widths)]
    names = _level_names("encoder.down_blocks.{}", "encoder.down.{}", "down", shortcut=any(changes), scales=last > 0)
    for level in range(last + 1):
        released = f"decoder.up_blocks.{last - level}"
        ours = f"decoder.up.{level}"
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
    if quant_convs:
        names |= {"quant_conv.{}": "quant_conv.{}", "post_quant_conv.{}": "post_quant_conv.{}"}
    return squeezed + renames(names)


def _level_names(released: str, ours: str, way: str, *, shortcut: bool, scales: bool) -> dict[str, str]:
    """{released name: our name} of a level, without the parts that it lacks."""
    names = {f"{released}.resnets.{{}}.conv_shortcut.{{}}": f"{ours}.block.{{}}.nin_shortcut.{{}}"} if shortcut else {}
    if scales:
        names[f"{released}.{way}samplers.0.conv.{{}}"] = f"{ours}.{way}sample.conv.{{}}"
    return names | {f"{released}.resnets.{{}}.{{}}.{{}}": f"{ours}.block.{{}}.{{}}.{{}}"}
