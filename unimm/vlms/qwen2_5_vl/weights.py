"""Qwen2.5-VL's key maps: the released names and ours."""

from collections.abc import Mapping
from typing import Any

from unimm.checkpoint.keymap import KeyMap, renames
from unimm.vlms.llama_layout import EXPERT, llama_key_map


def has_nested_names(keys: Mapping[str, Any], *, prefix: str = "") -> bool:
    """Whether released names are nested as transformers writes them today: below `model`, but for the head's."""
    return any(key.startswith((f"{prefix}model.language_model.", f"{prefix}model.visual.")) for key in keys)


def qwen_key_map(*, head: bool, nested: bool = False, prefix: str = "", module_prefix: str = "") -> KeyMap:
    """The key map. head: the files hold a language head; without, one may be there and is ignored.

    nested: see `has_nested_names`. prefix: what the released names begin with where the model is a part of another's
    files. module_prefix: what our names begin with there.
    """
    text, vision = ("model.language_model.", "model.visual.") if nested else ("model.", "visual.")
    key_map = llama_key_map(text, "lm_head", EXPERT, has_head=head) + qwen_vision_key_map(vision, "vision.")
    return key_map.prefixed(released=prefix, ours=module_prefix)


def qwen_vision_key_map(prefix: str, module_prefix: str) -> KeyMap:
    """The key map of the vision encoder; released names begin with `prefix`, ours with `module_prefix`."""
    names = {
        "patch_embed.proj.{}": "patch_embed.{}",
        "blocks.{}.norm1.{}": "blocks.{}.attn_norm.{}",
        "blocks.{}.norm2.{}": "blocks.{}.mlp_norm.{}",
        "blocks.{}.attn.qkv.{}": "blocks.{}.qkv.{}",
        "blocks.{}.attn.proj.{}": "blocks.{}.out_proj.{}",
        **{f"blocks.{{}}.mlp.{name}_proj.{{}}": f"blocks.{{}}.mlp.{name}.{{}}" for name in ("gate", "up", "down")},
        "merger.ln_q.{}": "merger.norm.{}",
        "merger.mlp.0.{}": "merger.mlp.fc1.{}",
        "merger.mlp.2.{}": "merger.mlp.fc2.{}",
    }
    return renames(names).prefixed(released=prefix, ours=module_prefix)
