"""A BAGEL of the released widths and of few layers, and a task that trains it on one pack."""

from typing import Any

import torch

from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.model import Bagel
from unimm.models.bagel.processor import BagelProcessor, BagelSpecialTokens
from unimm.sequence.packing import pack_sequences
from unimm.training.losses import LossSum

# the released llm_config.json and vit_config.json
LLM = dict(
    hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
    vocab_size=152064, max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, hidden_act="silu",
)  # fmt: skip
VIT = dict(
    hidden_size=1152,
    num_hidden_layers=27,
    num_attention_heads=16,
    intermediate_size=4304,
    patch_size=14,
    image_size=980,
)
PARAMETERS = 14_691_079_811  # of the release, with its two tables of positions
IDS = BagelSpecialTokens(bos=1, eos=2, boi=3, eoi=4)


def few_layers(*, values: bool, llm: dict[str, Any] | None = None, vit_layers: int = 2) -> Bagel:
    """A model on meta, or with zeros for weights; autoencoder and ViT are frozen."""
    numbers = LLM | dict(num_hidden_layers=1, vocab_size=1024) | (llm or {})
    config = BagelConfig.from_json(numbers, VIT | dict(num_hidden_layers=vit_layers), {})
    with torch.device("meta"):
        model = Bagel(config)
    if values:
        model = model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
    for part in (model.vae, model.vision):
        part.requires_grad_(False)
    return model


class PackTask:
    """Trains on packs of a caption and an image, and of an image and an answer."""

    name = "pack"
    loss_names = ("ce", "mse")

    def __init__(self, model: Bagel):
        self.model = model

    def batch(self, number: int):
        processor = BagelProcessor(
            special_tokens=IDS, vit_patch_size=14, vit_grid=70, latent_patch_size=2, latent_grid=64,
            interpolate_pos_embed=False,
        )  # fmt: skip
        text = processor.answer_part(list(range(20)))
        latent = processor.latent_part(torch.zeros(16, 8, 16), timestep=0.5, noised=True)
        patches = processor.vit_part(torch.zeros(3, 28, 56))
        pack = pack_sequences([[text, latent], [patches, text]])
        return pack, torch.zeros(len(pack.timesteps), 64)

    def losses(self, batch) -> dict[str, LossSum]:
        losses = self.model(*batch)
        return {"ce": LossSum.over(losses.ce), "mse": LossSum.over(losses.mse)}
