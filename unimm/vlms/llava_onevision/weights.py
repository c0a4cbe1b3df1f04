"""LLaVA-OneVision's key maps: the released names and ours."""

from collections.abc import Mapping
from typing import Any

from unimm.checkpoint.keymap import KeyMap
from unimm.encoders.siglip import siglip_key_map
from unimm.vlms.base import EXPERT
from unimm.vlms.llama_layout import llama_key_map
from unimm.vlms.llava_onevision.config import LlavaConfig


def llava_key_map(
    config: LlavaConfig, shapes: Mapping[str, Any], *, head: bool = True, prefix: str = "", module_prefix: str = ""
) -> KeyMap:
    """Released names on the left, ours on the right, in the spelling of files of these names (none: the older one).

    head: the files hold a language head, unless it is the table of embeddings. prefix: what their names begin with where
    the model is a part of another's files; ours: where it is in our model.
    """
    newer = any(key.startswith(f"{prefix}model.") for key in shapes)
    inner = prefix + ("model." if newer else "")
    body = inner + "language_model." + ("" if newer else "model.")
    top = prefix + ("" if newer else "language_model.") + "lm_head"
    rows = llama_key_map(body, top, EXPERT)
    if config.decoder.tie_word_embeddings or not head:
        rows = {**rows, top + ".{}": None}
    tower = inner + "vision_tower."
    # what transformers writes today leaves out the name around the tower
    tower += "" if any(key.startswith(f"{tower}embeddings.") for key in shapes) else "vision_model."
    return {
        **{theirs: module_prefix + target if target else None for theirs, target in rows.items()},
        **siglip_key_map(tower, module_prefix + "vision.", pooling_head=config.vision.has_pooling_head),
        inner + "multi_modal_projector.linear_1.{}": module_prefix + "projector.fc1.{}",
        inner + "multi_modal_projector.linear_2.{}": module_prefix + "projector.fc2.{}",
        inner + "image_newline": module_prefix + "image_newline",
    }
