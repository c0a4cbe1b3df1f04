"""Janus's key maps: the released names and ours."""

from unimm.checkpoint.keymap import Table
from unimm.models.janus.config import STREAM
from unimm.vlms.llama_layout import llama_keys

# released names on the left, ours on the right
KEYS: Table = {
    "vision_model.vision_tower.{*}": "vision.trunk.{*}",
    "aligner.layers.{}.{}": "aligner.layers.{}.{}",
    "gen_vision_model.{*}": "vq.{*}",
    "gen_aligner.layers.{}.{}": "code_aligner.layers.{}.{}",
    "gen_embed.{}": "code_embed.{}",
    "gen_head.output_mlp_projector.{}": "code_head.fc1.{}",
    "gen_head.vision_head.{}": "code_head.fc2.{}",
    **llama_keys("language_model.model.", "language_model.lm_head", STREAM),
}
