"""An MLLM, an autoencoder and a MetaQuery at toy size."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.paths import GOLDEN as STORE
from unimm.checkpoint.save import released_state_dict
from unimm.tokenizers import dc_ae
from unimm.tokenizers.dc_ae import DCAE, DCAEConfig
from unimm.tokenizers.text import SentencePieceTokenizer
from unimm.vlms.qwen2_5_vl.config import QwenVLConfig
from unimm.vlms.qwen2_5_vl.model import QwenVL

GOLDEN = STORE / "metaquery" / "dev"
STRINGS = {"eos_token_id": "<|im_end|>", "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
           "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}  # fmt: skip
SPECIAL_TOKENS = ("<|im_start|>", *STRINGS.values())
TEXT = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
    max_position_embeddings=512, tie_word_embeddings=True, rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
)  # fmt: skip
VISION = dict(
    depth=2, hidden_size=32, num_heads=2, intermediate_size=24, out_hidden_size=64, patch_size=8, spatial_merge_size=2,
    temporal_patch_size=2, window_size=32, fullatt_block_indexes=[1],
)  # fmt: skip
WIDTHS = dict(
    latent_channels=4, attention_head_dim=8, scaling_factor=0.8, encoder_block_out_channels=[8, 8, 8, 8, 16],
    decoder_block_out_channels=[8, 8, 8, 8, 16], encoder_layers_per_block=[1] * 5, decoder_layers_per_block=[1] * 5,
    encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_qkv_multiscales=[[]] * 5,
    decoder_qkv_multiscales=[[]] * 5,
)  # fmt: skip


def save_mllm(folder: Path, tokenizer: SentencePieceTokenizer, **changes) -> Path:
    """An untrained Qwen2.5-VL in the released layout, around a tokenizer with its special tokens."""
    ids = {name: tokenizer.special_ids[string] for name, string in STRINGS.items()}
    files = TEXT | ids | {"vocab_size": tokenizer.backend.vocab_size(), "vision_config": VISION} | changes
    torch.manual_seed(5)
    mllm = QwenVL(QwenVLConfig.from_json(files, {}))
    mllm.tokenizer = tokenizer
    mllm.save_pretrained(folder)
    return folder


def save_dcae(folder: Path) -> Path:
    """An untrained autoencoder of 16 pixels a latent, in the released layout."""
    torch.manual_seed(6)
    model = DCAE(DCAEConfig.from_json(WIDTHS))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_json()))
    save_file(
        released_state_dict(model, dc_ae.dc_ae_key_map(model.config)), folder / "diffusion_pytorch_model.safetensors"
    )
    return folder
