"""transformers' Qwen2.5-VL at toy size, saved in the released layout, and letters for its tokenizer."""

import json
from pathlib import Path
from typing import ClassVar

import torch

LOOK = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 1600}
VISION = dict(
    depth=3, hidden_size=40, num_heads=2, intermediate_size=28, out_hidden_size=72, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1], tokens_per_second=3, in_channels=3, hidden_act="silu",
)  # fmt: skip
TEXT = dict(
    hidden_size=72, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=50, vocab_size=160,
    rms_norm_eps=1e-5, max_position_embeddings=512, hidden_act="silu",
)  # fmt: skip
IDS = dict(eos_token_id=151, vision_start_token_id=152, vision_end_token_id=153, image_token_id=154, video_token_id=155)
TURNING = {"rope_theta": 5000.0, "rope_type": "default", "mrope_section": [1, 3, 2]}
SIZES = [(8, 8), (24, 16), (20, 37), (40, 40), (16, 100)]  # cells of 8 pixels, windows of 16


class Letters:
    """ASCII as ids, and the markers of Qwen2.5."""

    special_ids: ClassVar = {
        "<|im_start|>": 150, "<|im_end|>": 151, "<|vision_start|>": 152, "<|vision_end|>": 153, "<|image_pad|>": 154,
    }  # fmt: skip

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 128 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(one) for one in ids if one < 128)

    def token_id(self, token: str) -> int | None:
        return self.special_ids.get(token)

    def save(self, folder: Path) -> None:
        pass


def transformers_model(tied: bool = False):
    """transformers' model at toy size, of random weights larger than usual, so that differences show."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": TURNING, "eos_token_id": None, "bos_token_id": None},
        vision_config=VISION, tie_word_embeddings=tied, **IDS,
    )  # fmt: skip
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(std=1.5 * x[0].numel() ** -0.5) if x.ndim > 1 else x.add_(0.1 * torch.randn(x.shape))
    model.tie_weights()
    return model


def saved(model, folder: Path) -> Path:
    """transformers' model in a folder, with a preprocessor's config."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(LOOK))
    return folder


def files(**changes) -> dict:
    """A released config.json in the older spelling, some numbers of it changed."""
    turning = {"rope_theta": 5000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 3, 2]}}
    return TEXT | IDS | turning | {"vision_config": VISION} | changes
