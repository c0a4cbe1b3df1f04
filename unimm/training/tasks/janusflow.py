"""Training JanusFlow on the little world: pictures as velocities after their prompt, answers after pictures and questions.

Rectified flow, t = sigmoid(n), n ~ N(0, 1), beside next-token cross entropy (arXiv 2411.07975;
docs/originals/janusflow.md, "Training"). The paper's third loss, which draws the language model's features to those of
the tower, is left out.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from unimm.data.batching import (
    encode_latent_tokens,
    gen_token_counts,
    kind_indices,
    label_counts,
    mean_by_kind,
    stack_images,
)
from unimm.data.shapes import Example
from unimm.models.janusflow.config import JanusFlowConfig
from unimm.models.janusflow.model import JanusFlow
from unimm.models.janusflow.network import bos_unconditional, noised_part
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import Part
from unimm.training.config import TrainConfig, strict
from unimm.training.freezing import freeze
from unimm.training.init import compile_experts, init_decoder, init_timm_vit, train_tokenizer, trained_file
from unimm.training.samples import sample_grid
from unimm.training.tasks.deepseek_chat import (
    DEEPSEEK_TOKENS,
    IMAGE_KINDS,
    TEXT_KINDS,
    DeepseekChatDataset,
    DeepseekChatTrainingConfig,
)


@dataclass(frozen=True, kw_only=True)
class JanusFlowTrainingConfig(DeepseekChatTrainingConfig):
    """What the recipe's `options` may say."""

    # noised copies of a picture to draw, each at its own time: cheaper than as many samples
    timesteps_per_image: int
    # the folder of a trained VAE
    vae: str


@dataclass(frozen=True, kw_only=True)
class JanusFlowBatch:
    """A pack whose latent tokens only name their picture and their place in it, until the VAE has seen the pictures."""

    pack: PackedBatch
    images: Tensor  # [P, 3, h, w], what is drawn
    posterior: Tensor  # [P, z, h / 8, w / 8]
    noise: Tensor  # [draw tokens, p*p*C]
    text_kinds: Tensor  # [labels with loss], index into TEXTS
    image_kinds: Tensor  # [draw tokens], index into DRAWINGS


@dataclass(frozen=True, kw_only=True)
class JanusFlowDataset(DeepseekChatDataset):
    """Batches by step, with latents to draw."""

    options: JanusFlowTrainingConfig
    latent_shape: tuple[int, int, int]  # (channels, height, width)
    patch: int  # latents a token, along each side

    def batch(self, examples: Sequence[Example], rng: random.Random) -> JanusFlowBatch:
        """Examples as one pack, with the dice's times, noises and dropped conditions."""
        drawn: list[np.ndarray] = []
        samples = [self.sample(one, drawn, rng) for one in examples]
        n_tokens = gen_token_counts(samples)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        return JanusFlowBatch(
            pack=self.pack(samples),
            images=stack_images(drawn),
            posterior=torch.randn(len(drawn), *self.latent_shape, generator=generator),
            noise=torch.randn(sum(n_tokens), self.patch**2 * self.latent_shape[0], generator=generator),
            text_kinds=kind_indices(TEXT_KINDS, examples, label_counts(samples)),
            image_kinds=kind_indices(IMAGE_KINDS, examples, n_tokens),
        )

    def sample(self, one: Example, drawn: list[np.ndarray], rng: random.Random) -> list[Part]:
        """A question with its labelled answer, or a prompt, with a picture where it edits one, and noised copies to draw."""
        prompt = self.prompt_parts(one)
        if one.target is None:
            return prompt
        if rng.random() < self.options.dropout:
            prompt = bos_unconditional(prompt)
        places = torch.arange(self.latent_shape[1] * self.latent_shape[2] // self.patch**2)
        names = torch.stack((torch.full_like(places, len(drawn)), places), -1)
        drawn.append(one.target)
        times = torch.tensor([rng.gauss(0, 1) for _ in range(self.options.timesteps_per_image)]).sigmoid().tolist()
        return [*prompt, *(noised_part(names, self.prompts.special_tokens.boi, timestep=t) for t in times)]


class JanusFlowTask:
    """JanusFlow on the little world."""

    name = "janusflow-nano"
    loss_names = IMAGE_KINDS + TEXT_KINDS

    def __init__(self, model: JanusFlow, batch: JanusFlowDataset, vae: Path):
        self.model, self.batch, self.vae = model, batch, vae

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> JanusFlowTask:
        """A fresh model of the recipe's numbers around a trained VAE and a trained ViT."""
        options = strict(JanusFlowTrainingConfig, recipe.options, where="options")
        vae = trained_file(options.vae, "ae.safetensors", "bagel-nano-vae")
        tokenizer = train_tokenizer(options.vocab_size, special_tokens=DEEPSEEK_TOKENS)
        vae_files = json.loads((vae.parent / "vae_config.json").read_text())
        files = janusflow_config_json(recipe.model, vae_files, tokenizer.backend.vocab_size())
        torch.manual_seed(recipe.seed)
        model = JanusFlow(JanusFlowConfig.from_json(files, {}, vae_files))
        init_decoder(model.decoder)
        init_flow_layers(model)
        model.autoencoder.load_state_dict({name: x.float() for name, x in load_file(vae).items()})
        init_timm_vit(model.vision, load_file(trained_file(options.vit, "vision.safetensors", "bagel-nano-vit")))
        model.tokenizer = tokenizer
        if options.compile:
            compile_experts(model.decoder)
        freeze(model, options.frozen, always=("vae.", "vision.trunk.attn_pool."))
        worlds = JanusFlowDataset(
            options=options,
            prompts=model.processor,
            latent_shape=(model.config.gen_encoder.in_channels, *model.config.latent_size),
            patch=model.config.latent_patch_size,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        return cls(model, worlds, vae)

    def losses(self, batch: JanusFlowBatch) -> dict[str, Tensor]:
        """Mean loss of every kind of sample in the batch: flow losses of pictures, cross entropy of texts."""
        device = self.model.device
        losses = self.model(self.encode_latents(batch).to(device), batch.noise.to(device))
        return mean_by_kind(IMAGE_KINDS, batch.image_kinds, losses.mse) | mean_by_kind(
            TEXT_KINDS, batch.text_kinds, losses.text
        )

    def encode_latents(self, batch: JanusFlowBatch) -> PackedBatch:
        """The pack with real latent tokens; every picture meets the VAE once."""
        return encode_latent_tokens(
            batch.pack, self.model.autoencoder, batch.images, batch.posterior, patch=self.batch.patch
        )

    def sample_image(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """The released layout, in bfloat16; the VAE's file as it was trained."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        shutil.copyfile(self.vae, folder / "ae.safetensors")


def janusflow_config_json(model: Mapping, vae: Mapping, vocabulary: int) -> dict:
    """The contents of a config.json from the recipe's numbers: language, vision, flow, generation."""
    width, channels = model["flow"]["width"], vae["z_channels"]
    ends = {
        "block_out_channels": [width],
        "layers_in_middle": model["flow"]["blocks"],
        "hidden_size": model["language"]["hidden_size"],
    }
    return {
        "vision_und_enc_config": {"params": dict(model["vision"])},
        "vision_gen_enc_config": {"params": ends | {"input_channels": channels}},
        "vision_gen_dec_config": {"params": ends | {"in_channels": width, "out_channels": channels}},
        "language_config": {**model["language"], "vocab_size": vocabulary},
        "generation": dict(model["generation"]),
    }


def init_flow_layers(model: JanusFlow) -> None:
    """What enters beside words begins about as large as they are; the velocity begins as 0."""
    for linear in (model.aligner, model.gen_encoder_aligner):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    nn.init.normal_(model.und_start_embed, std=0.5)
    last = model.gen_decoder.out_convs[-1].unpatch_conv
    assert isinstance(last, nn.Conv2d), "the way out ends with a convolution"
    for table in (last.weight, last.bias):
        assert table is not None, "with a bias"
        nn.init.zeros_(table)
