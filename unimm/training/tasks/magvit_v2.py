"""Training MAGVIT-v2 on the shapes world: L1 and squared error, the distance from the signs, the entropy of bits.

The terms of the quantizer are Show-o's (docs/originals/show_o.md, "MAGVIT-v2"); the perceptual and adversarial losses of
the paper (arXiv 2310.05737) need networks that this package does not bring.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.save import MAX_SHARD_SIZE, parse_bytes, released_tensors, save_weights
from unimm.data.shapes.scenes import held_out_scenes, render_augmented, target_scenes
from unimm.tokenizers.magvit_v2 import KEY_MAP, WEIGHT_FILES, MagvitV2, MagvitV2Config
from unimm.training.config import RecipeSection, TrainConfig, from_mapping
from unimm.training.fields import AtLeastOne, Fraction, ImageTasks, Multipliers
from unimm.training.losses import LossSum
from unimm.training.samples import tensor_grid


@dataclass(frozen=True, kw_only=True)
class MagvitV2TrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # tasks of unimm.data.shapes whose target is an image, in turn
    tasks: ImageTasks
    # the part of things with novel colours, and with novel shapes, so that held-out pairs are reconstructed, too
    novel_colours: Fraction
    novel_shapes: Fraction
    # the part of scenes with five to nine things
    crowded: Fraction


@dataclass(frozen=True, kw_only=True)
class MagvitV2Architecture(RecipeSection):
    """The recipe's `model`; encoder and decoder have the same levels."""

    width: AtLeastOne
    multipliers: Multipliers
    n_blocks: Multipliers
    bits: AtLeastOne

    def config(self) -> MagvitV2Config:
        """The config of a model of these numbers."""
        return MagvitV2Config(
            encoder_width=self.width,
            encoder_multipliers=self.multipliers,
            encoder_blocks=self.n_blocks,
            decoder_width=self.width,
            decoder_multipliers=self.multipliers,
            decoder_blocks=self.n_blocks,
            bits=self.bits,
        )


@dataclass(frozen=True, kw_only=True)
class MagvitV2Dataset:
    """Batches of augmented train scenes [B, 3, h, w] in [-1, 1], by number."""

    options: MagvitV2TrainingConfig
    batch_size: int
    seed: int

    def __call__(self, number: int) -> Tensor:
        options = self.options
        indices = range(number * self.batch_size, (number + 1) * self.batch_size)
        return render_augmented(
            target_scenes(options.tasks, indices, seed=self.seed),
            Random(f"{self.seed}/{number}/vq"),
            colours=options.novel_colours,
            shapes=options.novel_shapes,
            crowded=options.crowded,
        )


def init_magvit_v2(config: MagvitV2Config) -> MagvitV2:
    """An untrained model whose residual branches add nothing yet."""
    vq = MagvitV2(config)
    for name, x in vq.named_parameters():
        if x.ndim == 4:
            nn.init.kaiming_normal_(x, nonlinearity="linear")
        if name.endswith(("conv2.weight", "proj_out.weight", "bias")):
            nn.init.zeros_(x)
    return vq


class MagvitV2Task:
    """Reconstruct images of the shapes world through signs."""

    name = "magvit_v2"
    loss_names = ("l1", "mse", "commitment", "entropy")

    def __init__(self, model: MagvitV2, options: MagvitV2TrainingConfig, recipe: TrainConfig) -> None:
        self.model = model
        self.batch = MagvitV2Dataset(options=options, batch_size=recipe.batch_size, seed=recipe.seed)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> MagvitV2Task:
        """Build a model of the recipe's numbers."""
        config = from_mapping(MagvitV2Architecture, recipe.model, where="model of the recipe").config()
        options = from_mapping(MagvitV2TrainingConfig, recipe.options, where="options of the recipe")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return cls(init_magvit_v2(config), options, recipe)

    def losses(self, batch: Tensor) -> dict[str, LossSum]:
        """Over pixels for l1 and mse, over the vectors' elements for the commitment, over vectors for the entropy."""
        image = batch.to(next(self.model.parameters()).device)
        z = self.model.encode(image)
        found = self.model.quantize(z)
        error = self.model.decode_codes(found.codes).float() - image
        return {
            "l1": LossSum.over(error.abs()),
            "mse": LossSum.over(error.square()),
            "commitment": LossSum.from_mean(found.commitment, z.numel()),
            "entropy": LossSum.from_mean(found.entropy - found.mean_entropy, z.numel() // z.shape[1]),
        }

    def loss_counts(self, batch: Tensor) -> dict[str, int]:
        """The numbers of pixels, of vectors' elements and of vectors."""
        n_vectors = batch.numel() // batch.shape[1] // self.model.config.stride**2
        pixels = {"l1": batch.numel(), "mse": batch.numel()}
        return pixels | {"commitment": n_vectors * self.model.config.bits, "entropy": n_vectors}

    def sample_image(self) -> Image.Image:
        """Test scenes, and below each its reconstruction."""
        image = held_out_scenes(self.batch.options.tasks, 8, self.batch.seed)[1]
        device = next(self.model.parameters()).device
        grid = (image.shape[2] // self.model.config.stride, image.shape[3] // self.model.config.stride)
        again = self.model.decode(self.model.encode_ids(image.to(device)), grid=grid)
        return tensor_grid(torch.cat((image, again.float().cpu())), columns=len(image))

    def save(self, folder: Path) -> None:
        """Write the released layout, in float32."""
        write_json(folder / "config.json", self.model.config.to_json())
        state = released_tensors(self.model, KEY_MAP)
        save_weights(state, folder, WEIGHT_FILES, max_shard_size=parse_bytes(MAX_SHARD_SIZE))
