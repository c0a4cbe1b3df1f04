"""Configs of LLaVA-OneVision, released and small, and a tokenizer of letters."""

from pathlib import Path
from typing import ClassVar

SIZE, SIDE, MOST = 14, 3, 2  # a rest of 2 pixels fills no patch; features of more than 2 tiles are shrunk
PINS = [[SIZE * h, SIZE * w] for h in range(1, 4) for w in range(1, 4)]
VISION = dict(
    hidden_size=24, intermediate_size=20, num_attention_heads=3, num_hidden_layers=2, patch_size=4, image_size=SIZE,
    vision_use_head=False, model_type="siglip_vision_model",
)  # fmt: skip
TEXT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, vocab_size=160,
    rms_norm_eps=1e-5, max_position_embeddings=512, model_type="qwen2", eos_token_id=151,
)  # fmt: skip
TOP = dict(
    image_token_index=154, video_token_index=155, image_grid_pinpoints=PINS, vision_aspect_ratio=f"anyres_max_{MOST}",
    model_type="llava_onevision",
)  # fmt: skip
# of the released 0.5B; the markers of MetaQuery's files are behind the vocabulary
RELEASED = {
    "text_config": dict(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
        vocab_size=152000, rope_theta=1e6, tie_word_embeddings=True, sliding_window=32768, use_sliding_window=False,
    ),
    "vision_config": dict(
        hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=26, patch_size=14, image_size=384,
        vision_use_head=False,
    ),
}  # fmt: skip


class Letters:
    """ASCII as ids, and the markers of LLaVA-OneVision."""

    special_ids: ClassVar = {"<|im_start|>": 150, "<|im_end|>": 151, "<image>": 154, "<video>": 155}

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 128 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(one) for one in ids if one < 128)

    def token_id(self, token: str) -> int | None:
        return self.special_ids.get(token)

    def save(self, folder: Path) -> None:
        pass
