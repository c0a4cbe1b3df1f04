"""Small random Emu3s in files of the original layout."""

import base64
import json
from pathlib import Path

import torch

from unimm.models.emu3.model import Emu3
from unimm.models.emu3.text_tokenizer import RANKS_FILE, SPECIAL_TOKENS, VISION_TOKENS_FILE

PAIRS = [b"th", b"the", b" a", b"in", b"ing", b" c", b" ca", b"at", b"\xc3\xa9", b"  "]
N_RANKS = 256 + len(PAIRS)
N_CODES = 48
FIRST_VISION = N_RANKS + len(SPECIAL_TOKENS)
LANGUAGE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, rope_theta=10000.0, rms_norm_eps=1e-5, attention_dropout=0.0,
)  # fmt: skip
VISION = dict(
    codebook_size=N_CODES, embed_dim=4, z_channels=4, ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[1],
    temporal_downsample_factor=4, in_channels=3, out_channels=3, double_z=False, dropout=0.0,
)  # fmt: skip
IMAGES = dict(min_pixels=64, max_pixels=160)


def write_tokenizer(folder: Path) -> None:
    """emu3.tiktoken and emu3_vision_tokens.txt: bytes, some pairs, and the special tokens behind them."""
    tokens = [bytes([byte]) for byte in range(256)] + PAIRS
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / RANKS_FILE).write_text("".join(lines))
    vision = ["<|image token|>", "<|image start|>", "<|image end|>"]
    vision += [f"<|visual token {code:06d}|>" for code in range(N_CODES)]
    (folder / VISION_TOKENS_FILE).write_text("\n".join(vision))


def emu3(folder: Path, seed: int = 0, *, tokenizer: bool = True, language: dict | None = None, vision: dict | None = None,
         generation: dict | None = None) -> Path:  # fmt: skip
    """A random Emu3 with a vision tokenizer of 2 pixels a code, saved into a folder in the original layout."""
    torch.manual_seed(seed)
    below = folder / "vision_tokenizer"
    stride = 2 ** (len((VISION | (vision or {}))["ch_mult"]) - 1)
    below.mkdir(parents=True, exist_ok=True)
    extra = {"eol": 200, "eof": 201, "bos": 203, "eos": 204}
    ids = {f"{name}_token_id": N_RANKS + 3 + at for name, at in extra.items()}
    ids |= {f"{name}_token_id": FIRST_VISION + i for i, name in enumerate(("img", "boi", "eoi"))}
    ids |= {"pad_token_id": N_RANKS, "vocab_size": FIRST_VISION + 3 + N_CODES, "image_area": 64, "model_type": "Emu3"}
    files = LANGUAGE | ids | (language or {}) | ({"generation": generation} if generation else {})
    (folder / "config.json").write_text(json.dumps(files))
    (below / "config.json").write_text(json.dumps(VISION | (vision or {})))
    (below / "preprocessor_config.json").write_text(json.dumps(IMAGES | {"spatial_factor": stride}))
    if tokenizer:
        write_tokenizer(folder)
    model = Emu3.from_folder(folder)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.startswith("decoder") and x.ndim == 2:
                x.normal_(std=2 * x.shape[1] ** -0.5)  # larger than usual, so that differences show
        for name, x in model.named_buffers():
            if name.endswith("running_mean"):
                x.normal_(std=0.1)
            elif name.endswith("running_var"):
                x.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder
