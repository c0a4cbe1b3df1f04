"""JanusFlow's key maps: the released names and ours."""

from unimm.checkpoint.keymap import KeyMap, Rename, renames
from unimm.vlms.llama_layout import EXPERT, llama_key_map

# released names on the left, ours on the right
KEY_MAP = renames(
    {
        "beg_of_und_embed": "und_start_embed",
        "vision_und_enc_model.vision_tower.{*}": "vision.trunk.{*}",
        "vision_und_enc_aligner.{}": "aligner.{}",
        "vision_gen_enc_model.{*}": "gen_encoder.{*}",
        "vision_gen_enc_aligner.{}": "gen_encoder_aligner.{}",
        "vision_gen_dec_aligner_norm.{}": "gen_decoder_norm.{}",
        "vision_gen_dec_aligner.{}": "gen_decoder_aligner.{}",
        "vision_gen_dec_model.{*}": "gen_decoder.{*}",
    }
) + llama_key_map("language_model.model.", "language_model.lm_head", EXPERT)
VAE_KEY_MAP = KeyMap(Rename("{*}", "vae.{*}"))
