"""The released config of Sana's DC-AE."""

import json

from helpers.paths import GOLDEN

FILES = json.loads((GOLDEN / "blocks" / "dcae" / "config.json").read_text())
WIDTHS = [128, 256, 512, 512, 1024, 1024]

RELEASED = FILES | {
    "encoder_block_out_channels": WIDTHS, "decoder_block_out_channels": WIDTHS, "latent_channels": 32,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3] * 6, "attention_head_dim": 32,
}  # fmt: skip
