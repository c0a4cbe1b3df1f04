"""Qwen2.5-VL's key maps: the released names and ours."""

from collections.abc import Mapping
from typing import Any

from unimm.checkpoint.keymap import KeyMap
from unimm.vlms.base import EXPERT
from unimm.vlms.llama_layout import llama_key_map


def has_nested_names(keys: Mapping[str, Any], *, prefix: str = "") -> bool:
    """Whether released names are in the newer spelling, the language model's and the tower's below `model`."""
    return any(key.startswith((f"{prefix}model.language_model.", f"{prefix}model.visual.")) for key in keys)


def qwen_key_map(*, head: bool, nested: bool = False, prefix: str = "", module_prefix: str = "") -> KeyMap:
    """Released names on the left, ours on the right. head: the files hold a language head; else one may be there, unread.

    nested: the newer spelling. prefix: what their names begin with where the model is a part of another's files; ours:
    where it is in our model.
    """
    text, sight = ("model.language_model.", "model.visual.") if nested else ("model.", "visual.")
    rows = llama_key_map(prefix + text, prefix + "lm_head", EXPERT)
    rows = {theirs: module_prefix + target if target else None for theirs, target in rows.items()}
    unread = {} if head else {prefix + "lm_head.{}": None}
    return {**rows, **unread, **qwen_vision_key_map(prefix + sight, module_prefix + "vision.")}


def qwen_vision_key_map(prefix: str, module_prefix: str) -> KeyMap:
    """Rows of a key table; released names begin with `theirs`, ours with `ours`."""
    block, part = prefix + "blocks.{}.", module_prefix + "blocks.{}."
    return {
        prefix + "patch_embed.proj.{}": module_prefix + "patch_embed.{}",
        block + "norm1.{}": part + "attn_norm.{}",
        block + "norm2.{}": part + "mlp_norm.{}",
        block + "attn.qkv.{}": part + "qkv.{}",
        block + "attn.proj.{}": part + "out_proj.{}",
        **{block + f"mlp.{name}_proj.{{}}": part + f"mlp.{name}.{{}}" for name in ("gate", "up", "down")},
        prefix + "merger.ln_q.{}": module_prefix + "merger.norm.{}",
        prefix + "merger.mlp.0.{}": module_prefix + "merger.mlp.fc1.{}",
        prefix + "merger.mlp.2.{}": module_prefix + "merger.mlp.fc2.{}",
    }
