"""Qwen2.5-VL's key maps: the released names and ours."""

from collections.abc import Mapping
from typing import Any

from unimm.checkpoint.keymap import Table
from unimm.vlms.base import STREAM
from unimm.vlms.llama_layout import llama_keys


def nested(keys: Mapping[str, Any], *, prefix: str = "") -> bool:
    """Whether released names are in the newer spelling, the language model's and the tower's below `model`."""
    return any(key.startswith((f"{prefix}model.language_model.", f"{prefix}model.visual.")) for key in keys)


def qwen_keys(*, head: bool, nested: bool = False, prefix: str = "", ours: str = "") -> Table:
    """Released names on the left, ours on the right. head: the files hold a language head; else one may be there, unread.

    nested: the newer spelling. prefix: what their names begin with where the model is a part of another's files; ours:
    where it is in our model.
    """
    text, sight = ("model.language_model.", "model.visual.") if nested else ("model.", "visual.")
    rows = llama_keys(prefix + text, prefix + "lm_head", STREAM)
    rows = {theirs: ours + target if target else None for theirs, target in rows.items()}
    unread = {} if head else {prefix + "lm_head.{}": None}
    return {**rows, **unread, **vision_keys(prefix + sight, ours + "vision.")}


def vision_keys(theirs: str, ours: str) -> Table:
    """Rows of a key table; released names begin with `theirs`, ours with `ours`."""
    block, part = theirs + "blocks.{}.", ours + "blocks.{}."
    return {
        theirs + "patch_embed.proj.{}": ours + "patch.{}",
        block + "norm1.{}": part + "attn_norm.{}",
        block + "norm2.{}": part + "mlp_norm.{}",
        block + "attn.qkv.{}": part + "qkv.{}",
        block + "attn.proj.{}": part + "o.{}",
        **{block + f"mlp.{name}_proj.{{}}": part + f"mlp.{name}.{{}}" for name in ("gate", "up", "down")},
        theirs + "merger.ln_q.{}": ours + "merger.norm.{}",
        theirs + "merger.mlp.0.{}": ours + "merger.mlp.fc1.{}",
        theirs + "merger.mlp.2.{}": ours + "merger.mlp.fc2.{}",
    }
