"""LLaVA-OneVision's key maps: the released names and ours."""

from collections.abc import Mapping
from typing import Any

from unimm.checkpoint.keymap import KeyMap, renames
from unimm.encoders.siglip import siglip_key_map
from unimm.vlms.llama_layout import EXPERT, llama_key_map
from unimm.vlms.llava_onevision.config import LlavaConfig


def llava_key_map(
    config: LlavaConfig, shapes: Mapping[str, Any], *, head: bool = True, prefix: str = "", module_prefix: str = ""
) -> KeyMap:
    """The key map for files whose tensors have these names, nested as transformers writes them today or not; for none,
    not.

    head: the files hold a language head, unless it is the table of embeddings. prefix: what the released names begin
    with where the model is a part of another's files. module_prefix: what our names begin with there.
    """
    newer = any(key.startswith(f"{prefix}model.") for key in shapes)
    inner = prefix + ("model." if newer else "")
    body = inner + "language_model." + ("" if newer else "model.")
    top = prefix + ("" if newer else "language_model.") + "lm_head"
    language_model = llama_key_map(body, top, EXPERT, has_head=head and not config.decoder.tie_word_embeddings)
    encoder = inner + "vision_tower."
    # what transformers writes today leaves out the name around the vision encoder
    encoder += "" if any(key.startswith(f"{encoder}embeddings.") for key in shapes) else "vision_model."
    vision = siglip_key_map(encoder, "vision.", pooling_head=config.vision.has_pooling_head)
    projector = renames(
        {
            inner + "multi_modal_projector.linear_1.{}": "projector.fc1.{}",
            inner + "multi_modal_projector.linear_2.{}": "projector.fc2.{}",
            inner + "image_newline": "image_newline",
        }
    )
    return (language_model + vision + projector).prefixed(ours=module_prefix)
