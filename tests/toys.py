"""Small random models for the tests, and a tokenizer of whole words."""
import copy

import torch
from PIL import Image

from unimm.models.bagel import Bagel, BagelConfig
from unimm.models.dialogue import Markers

LLM = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=80,
    vocab_size=96,
    max_position_embeddings=256,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    hidden_act="silu",
)
VIT = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, patch_size=8, image_size=64)
TOP = dict(
    latent_patch_size=2,
    max_latent_size=8,
    vit_max_num_patch_per_side=8,
    vae_config=dict(ch=32, ch_mult=[1, 1, 1], num_res_blocks=1, z_channels=3, scale_factor=0.7, shift_factor=0.1),
    vae_transform=dict(max_image_size=48, min_image_size=16, image_stride=8),
    vit_transform=dict(max_image_size=48, min_image_size=16, image_stride=8),
    generation=dict(steps=4, shift=2.0, size=[24, 32], think_tokens=6, think_draw="think then draw", think_answer="think"),
)


class Words:
    """Every word has an id by its letters; special tokens have the last four."""

    def __init__(self, vocab: int):
        self.vocab = vocab

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, word)) % (self.vocab - 4) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {i}" for i in ids)

    def id(self, token: str) -> int | None:
        names = list(Markers.STRINGS.values())
        return self.vocab - 4 + names.index(token) if token in names else None

    def save(self, folder) -> None:
        pass


def toy(seed: int = 0, *, llm: dict | None = None, vit: dict | None = None, top: dict | None = None) -> Bagel:
    """A random Bagel of two layers; the arguments change numbers of its released files."""
    torch.manual_seed(seed)
    model = Bagel(BagelConfig.from_files(LLM | (llm or {}), VIT | (vit or {}), copy.deepcopy(TOP) | (top or {})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("decoder") and parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)  # larger than usual, so that differences show
    model.tokenizer = Words(model.cfg.decoder.vocab)
    return model.eval()


def picture(width: int = 30, height: int = 22, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
