"""JanusFlow's key maps: the released names and ours."""

from unimm.checkpoint.keymap import Table
from unimm.models.janusflow.config import STREAM
from unimm.vlms.llama_layout import llama_keys

# released names on the left, ours on the right
KEYS: Table = {
    "beg_of_und_embed": "look_start",
    "vision_und_enc_model.vision_tower.{*}": "vision.trunk.{*}",
    "vision_und_enc_aligner.{}": "aligner.{}",
    "vision_gen_enc_model.{*}": "encoder.{*}",
    "vision_gen_enc_aligner.{}": "from_grid.{}",
    "vision_gen_dec_aligner_norm.{}": "to_grid_norm.{}",
    "vision_gen_dec_aligner.{}": "to_grid.{}",
    "vision_gen_dec_model.{*}": "painter.{*}",
    **llama_keys("language_model.model.", "language_model.lm_head", STREAM),
}
VAE_KEYS: Table = {"{*}": "vae.{*}"}
