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

from unimm.data.batching import by_group, drawn_tokens, encoded, groups, labels, to_images
from unimm.data.shapes import Example
from unimm.models.janusflow.config import JanusFlowConfig
from unimm.models.janusflow.model import JanusFlow
from unimm.models.janusflow.network import target, unconditional
from unimm.sequence.packing import Pack
from unimm.sequence.parts import Item
from unimm.training.config import Recipe, strict
from unimm.training.freezing import freeze
from unimm.training.init import compile_streams, init_decoder, load_tower, text_model, trained
from unimm.training.samples import sheet
from unimm.training.tasks.deepseek_chat import DRAWINGS, SYMBOLS, TEXTS, Common, Conversations


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What the recipe's `options` may say."""

    # noised copies of a picture to draw, each at its own time: cheaper than as many samples
    targets: int
    # the folder of a trained VAE
    vae: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A pack whose latent tokens only name their picture and their place in it, until the VAE has seen the pictures."""

    pack: Pack
    images: Tensor  # [P, 3, h, w], what is drawn
    posterior: Tensor  # [P, z, h / 8, w / 8]
    noise: Tensor  # [draw tokens, p*p*C]
    text_groups: Tensor  # [labels with loss], index into TEXTS
    draw_groups: Tensor  # [draw tokens], index into DRAWINGS


@dataclass(frozen=True, kw_only=True)
class Worlds(Conversations):
    """Batches by step, with latents to draw."""

    options: Options
    latent: tuple[int, int, int]  # (channels, height, width)
    patch: int  # latents a token, along each side

    def batch(self, examples: Sequence[Example], dice: random.Random) -> Batch:
        """Examples as one pack, with the dice's times, noises and dropped conditions."""
        drawn: list[np.ndarray] = []
        samples = [self.sample(one, drawn, dice) for one in examples]
        n_tokens = drawn_tokens(samples)
        generator = torch.Generator().manual_seed(dice.getrandbits(62))
        return Batch(
            pack=self.packed(samples),
            images=to_images(drawn),
            posterior=torch.randn(len(drawn), *self.latent, generator=generator),
            noise=torch.randn(sum(n_tokens), self.patch**2 * self.latent[0], generator=generator),
            text_groups=groups(TEXTS, examples, labels(samples)),
            draw_groups=groups(DRAWINGS, examples, n_tokens),
        )

    def sample(self, one: Example, drawn: list[np.ndarray], dice: random.Random) -> list[Item]:
        """A question with its labelled answer, or a prompt, with a picture where it edits one, and noised copies to draw."""
        prompt = self.asked(one)
        if one.target is None:
            return prompt
        if dice.random() < self.options.dropout:
            prompt = unconditional(prompt)
        places = torch.arange(self.latent[1] * self.latent[2] // self.patch**2)
        names = torch.stack((torch.full_like(places, len(drawn)), places), -1)
        drawn.append(one.target)
        times = torch.tensor([dice.gauss(0, 1) for _ in range(self.options.targets)]).sigmoid().tolist()
        return [*prompt, *(target(names, self.prompts.markers.boi, time=t) for t in times)]


class JanusFlowObjective:
    """JanusFlow on the little world."""

    name = "janusflow-nano"
    loss_names = DRAWINGS + TEXTS

    def __init__(self, model: JanusFlow, batch: Worlds, vae: Path):
        self.model, self.batch, self.vae = model, batch, vae

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> JanusFlowObjective:
        """A fresh model of the recipe's numbers around a trained VAE and a trained ViT."""
        options = strict(Options, recipe.options, where="options")
        vae = trained(options.vae, "ae.safetensors", "bagel-nano-vae")
        tokenizer = text_model(options.vocabulary, markers=SYMBOLS)
        vae_files = json.loads((vae.parent / "vae_config.json").read_text())
        files = config_files(recipe.model, vae_files, tokenizer.inner.vocab_size())
        torch.manual_seed(recipe.seed)
        model = JanusFlow(JanusFlowConfig.from_files(files, {}, vae_files))
        init_decoder(model.decoder)
        init_ends(model)
        model.autoencoder.load_state_dict({name: x.float() for name, x in load_file(vae).items()})
        load_tower(model.vision, load_file(trained(options.vit, "vision.safetensors", "bagel-nano-vit")))
        model.tokenizer = tokenizer
        if options.compiled:
            compile_streams(model.decoder)
        freeze(model, options.frozen, always=("vae.", "vision.trunk.attn_pool."))
        worlds = Worlds(
            options=options,
            prompts=model.prompts,
            latent=(model.cfg.encoder.in_channels, *model.cfg.latent),
            patch=model.cfg.patch,
            size=recipe.batch,
            seed=recipe.seed,
        )
        return cls(model, worlds, vae)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean loss of every kind of sample in the batch: flow losses of pictures, cross entropy of texts."""
        device = self.model.device
        losses = self.model(self.encoded(batch).to(device), batch.noise.to(device))
        return by_group(DRAWINGS, batch.draw_groups, losses.mse) | by_group(TEXTS, batch.text_groups, losses.text)

    def encoded(self, batch: Batch) -> Pack:
        """The pack with real latent tokens; every picture meets the VAE once."""
        return encoded(batch.pack, self.model.autoencoder, batch.images, batch.posterior, patch=self.batch.patch)

    def picture(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return sheet(self.model)

    def save(self, folder: Path) -> None:
        """The released layout, in bfloat16; the VAE's file as it was trained."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        shutil.copyfile(self.vae, folder / "ae.safetensors")


def config_files(model: Mapping, vae: Mapping, vocabulary: int) -> dict:
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


def init_ends(model: JanusFlow) -> None:
    """What enters beside words begins about as large as they are; the velocity begins as 0."""
    for linear in (model.aligner, model.from_grid):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    nn.init.normal_(model.look_start, std=0.5)
    last = model.painter.out_convs[-1].unpatch_conv
    assert isinstance(last, nn.Conv2d), "the way out ends with a convolution"
    for table in (last.weight, last.bias):
        assert table is not None, "with a bias"
        nn.init.zeros_(table)
