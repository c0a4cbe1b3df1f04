"""Configs of Sana's denoiser, released and small."""

import json

from helpers.paths import GOLDEN

FILES = json.loads((GOLDEN / "blocks" / "sana" / "dev" / "config.json").read_text())
# the release at 512 pixels; that at 1024 has a sample_size of 32 and the same weights' shapes
RELEASED = FILES | {
    "in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240, "caption_channels": 2304,
    "sample_size": 16,
}  # fmt: skip
