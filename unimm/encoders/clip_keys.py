"""The key maps of CLIP's two encoders, whose layers have the same names."""

from collections.abc import Collection, Mapping
from typing import Literal

from unimm.checkpoint.keymap import Ignore, KeyMap, renames

LAYERS = {
    "encoder.layers.{}.layer_norm1.{}": "blocks.{}.attn_norm.{}",
    "encoder.layers.{}.layer_norm2.{}": "blocks.{}.mlp_norm.{}",
    **{f"encoder.layers.{{}}.self_attn.{p}_proj.{{}}": f"blocks.{{}}.{p}.{{}}" for p in "qkv"},
    "encoder.layers.{}.self_attn.out_proj.{}": "blocks.{}.out_proj.{}",
    "encoder.layers.{}.mlp.{}.{}": "blocks.{}.mlp.{}.{}",
}


def clip_key_map(encoder: Literal["text", "vision"], rows: Mapping[str, str], shapes: Collection[str]) -> KeyMap:
    """The key map of an encoder for files of these names (none: the released ones), which may hold the rest of a CLIP,
    too. rows: what it has beside its layers."""
    # what transformers writes of an encoder alone today has no name around it
    prefix = "" if any(key.startswith("embeddings.") for key in shapes) else f"{encoder}_model."
    other = "vision" if encoder == "text" else "text"
    names = (f"{other}_model.{{*}}", "visual_projection.weight", "text_projection.weight", "logit_scale")
    beside = [Ignore(name, because=f"a part of the whole CLIP, beside the {encoder} encoder") for name in names]
    old = KeyMap(Ignore("embeddings.position_ids", because="a buffer of older files"))
    return (renames({**rows, **LAYERS}) + old).prefixed(released=prefix) + KeyMap(*beside)
