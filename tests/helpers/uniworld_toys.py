"""The stored UniWorld with the parts that its case leaves out: a small VAE, CLIP and T5, all untrained."""

import tempfile
from pathlib import Path

import tokenizers
import torch

from helpers.paths import GOLDEN
from unimm import UniWorld
from unimm.encoders.clip_text import CLIPTextConfig, CLIPTextEncoder
from unimm.encoders.t5 import T5Config, T5Encoder
from unimm.tokenizers.captions import load_clip_captions, load_t5_captions
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig

CASE = GOLDEN / "uniworld" / "dev"
CLIP = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=8,
            max_position_embeddings=77, eos_token_id=3)  # fmt: skip
T5 = dict(vocab_size=8, d_model=40, d_kv=8, num_heads=2, d_ff=24, num_layers=1, feed_forward_proj="gated-gelu",
          model_type="t5")  # fmt: skip


HOME = tempfile.TemporaryDirectory(prefix="uniworld-words-")  # of the tokenizer; gone with the process
WORDS = ("a", "cat", "<|startoftext|>", "<|endoftext|>", "</s>", "<pad>", "<unk>", "bird")


def words(folder: Path) -> Path:
    """A folder with a tokenizer of few words, which has the special tokens of CLIP's and of T5's."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(list(WORDS[2:7]))
    inner.save(str(folder / "tokenizer.json"))
    return folder


def uniworld(*, vae: bool = True, clip: bool = True, t5: bool = True) -> UniWorld:
    """The stored model, which generates 64 x 64 pixels."""
    model = UniWorld.from_pretrained(CASE)
    torch.manual_seed(4)
    folder = words(Path(HOME.name))
    if vae:
        model.auxiliary.vae = AutoencoderKL(
            AutoencoderKLConfig(width=32, channel_multipliers=(1, 1, 1, 1), n_res_blocks=1, latent_channels=4)
        ).eval()
    if clip:
        model.auxiliary.clip, model.auxiliary.clip_tokenizer = (
            CLIPTextEncoder(CLIPTextConfig.from_json(CLIP)).eval(),
            load_clip_captions(folder),
        )
        torch.nn.init.normal_(model.auxiliary.clip.pos_embed)
    if t5:
        model.auxiliary.t5, model.auxiliary.t5_tokenizer = (
            T5Encoder(T5Config.from_json(T5)).eval(),
            load_t5_captions(folder),
        )
    model.config = model.config.__class__(**vars(model.config) | {"image_pixels": 64 * 64, "steps": 2, "t5_tokens": 16})
    return model.requires_grad_(False)
