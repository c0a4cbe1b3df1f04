"""Janus's key maps: the released names and ours."""

from unimm.checkpoint.keymap import renames
from unimm.vlms.llama_layout import EXPERT, llama_key_map

# released names on the left, ours on the right
KEY_MAP = renames(
    {
        "vision_model.vision_tower.{*}": "vision.trunk.{*}",
        "aligner.layers.{}.{}": "aligner.layers.{}.{}",
        "gen_vision_model.{*}": "vq.{*}",
        "gen_aligner.layers.{}.{}": "gen_aligner.layers.{}.{}",
        "gen_embed.{}": "gen_embed.{}",
        "gen_head.output_mlp_projector.{}": "gen_head.fc1.{}",
        "gen_head.vision_head.{}": "gen_head.fc2.{}",
    }
) + llama_key_map("language_model.model.", "language_model.lm_head", EXPERT)
