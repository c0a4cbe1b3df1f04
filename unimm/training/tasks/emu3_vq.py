"""Training Emu3's vision tokenizer on images of the shapes world: L1 and squared error, codebook and commitment losses.

The released tokenizer was trained on videos, with a perceptual and an adversarial loss, which need pretrained networks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.load import parse_dtype
from unimm.checkpoint.save import own_name, own_state_dict, save_safetensors
from unimm.data.shapes.scenes import held_out_scenes, reconstruction_scores, render_augmented, target_scenes
from unimm.nn.flops import StepFlops
from unimm.tokenizers.emu3_vq import Emu3VQConfig, Emu3VQModel, NearestCodeQuantizer
from unimm.tokenizers.flops import emu3_vq_decode_flops, emu3_vq_encode_flops
from unimm.training.config import RecipeSection, TrainConfig, from_mapping
from unimm.training.fields import (
    AtLeastOne,
    Dtype,
    Fraction,
    ImageTasks,
    Multipliers,
    NoneOrMore,
    held_out_seed,
)
from unimm.training.losses import LossSum
from unimm.training.samples import tensor_grid
from unimm.training.tasks.vq import VQBatch, check_one_device, moves_codes, sample_far_vectors
from unimm.training.throughput import StepCounts

# batches whose vectors the codebook starts from, and whose codes count as used
SEEN_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class Emu3VQTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # tasks of unimm.data.shapes whose target is an image, in turn
    tasks: ImageTasks
    # the part of things with novel colours, and with novel shapes
    novel_colours: Fraction
    novel_shapes: Fraction
    # the part of scenes with five to nine things
    crowded: Fraction
    # so many steps are trained without the codebook, which then starts from vectors of images
    unquantized_steps: NoneOrMore
    # every so many steps, in the first `revive_fraction` of them, codes that the next images leave unused move to
    # vectors far from their codes
    revive_every: AtLeastOne
    revive_fraction: Fraction
    # test scenes that are scored
    scored_scenes: AtLeastOne
    # of the released weights
    dtype: Dtype


@dataclass(frozen=True, kw_only=True)
class Emu3VQArchitecture(RecipeSection):
    """The recipe's `model`: numbers of Emu3VQConfig."""

    width: AtLeastOne
    multipliers: Multipliers
    n_blocks: AtLeastOne
    attention_levels: tuple[int, ...]
    n_codes: AtLeastOne
    code_dim: AtLeastOne
    frames_per_latent: AtLeastOne

    def config(self) -> Emu3VQConfig:
        """The config of a model of these numbers."""
        return Emu3VQConfig(
            width=self.width,
            channel_multipliers=self.multipliers,
            n_res_blocks=self.n_blocks,
            attention_levels=self.attention_levels,
            n_codes=self.n_codes,
            code_dim=self.code_dim,
            latent_channels=self.code_dim,
            frames_per_latent=self.frames_per_latent,
        )


@dataclass(frozen=True, kw_only=True)
class Emu3VQDataset:
    """Batches of augmented train scenes, by number."""

    options: Emu3VQTrainingConfig
    batch_size: int
    seed: int

    def __call__(self, number: int) -> VQBatch:
        options = self.options
        indices = range(number * self.batch_size, (number + 1) * self.batch_size)
        image = render_augmented(
            target_scenes(options.tasks, indices, seed=self.seed),
            Random(f"{self.seed}/{number}/emu3_vq"),
            colours=options.novel_colours,
            shapes=options.novel_shapes,
            crowded=options.crowded,
        )
        return VQBatch(image=image, number=number)


class Emu3VQTask:
    """Reconstruct images of the shapes world through Emu3's codebook."""

    name = "emu3_vq"
    loss_names = ("l1", "mse", "codebook", "commitment")

    def __init__(self, model: Emu3VQModel, options: Emu3VQTrainingConfig, recipe: TrainConfig) -> None:
        check_one_device()
        self.model = model
        self.options = options
        self.batches_per_step = recipe.gradient_accumulation
        self.revive_until = round(options.revive_fraction * recipe.steps)
        self.batch = Emu3VQDataset(options=options, batch_size=recipe.batch_size, seed=recipe.seed)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> Emu3VQTask:
        """Build an untrained model of the recipe's numbers."""
        config = from_mapping(Emu3VQArchitecture, recipe.model, where="model of the recipe").config()
        options = from_mapping(Emu3VQTrainingConfig, recipe.options, where="options of the recipe")
        torch.manual_seed(recipe.seed)
        return cls(init_emu3_vq(config), options, recipe)

    @property
    def held_out_batch(self) -> Emu3VQDataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def losses(self, batch: VQBatch) -> dict[str, LossSum]:
        """Losses over pixels, and, once images are quantized, over the numbers of the vectors."""
        vq = self.model
        image = batch.image.to(vq.quantize.embedding.weight.device)
        if self.is_unquantized(batch.number):
            return reconstruction_losses(vq.decode_codes(vq.encode(image)), image)
        if vq.training:
            self._move_codes(batch.number)
        z = vq.encode(image)
        found = vq.quantize(z)
        losses = reconstruction_losses(vq.decode_codes(found.codes), image)
        losses["codebook"] = LossSum.from_mean(found.codebook_loss, z.numel())
        losses["commitment"] = LossSum.from_mean(found.commitment_loss, z.numel())
        return losses

    def is_unquantized(self, number: int) -> bool:
        """Whether the vectors of a batch are decoded as they are."""
        return self.model.training and number // self.batches_per_step < self.options.unquantized_steps

    @torch.no_grad()
    def _move_codes(self, number: int) -> None:
        """Let the codebook start, or move unused codes, where the batch of this number is one before which that is done.

        What counts as unused depends on the weights and on batches by number, so that a resumed run is the unbroken one.
        """
        first = self.options.unquantized_steps
        if not moves_codes(
            number,
            batches_per_step=self.batches_per_step,
            first=first,
            every=self.options.revive_every,
            until=self.revive_until,
        ):
            return
        vq = self.model
        device = vq.quantize.embedding.weight.device
        z = torch.cat([vq.encode(self.batch(number + i).image.to(device)) for i in range(SEEN_BATCHES)])
        generator = torch.Generator().manual_seed(self.batch.seed * 2**32 + number)
        if number == first * self.batches_per_step:
            begin_codebook(vq.quantize, z, generator)
        else:
            revive_unused_codes(vq.quantize, z, generator)

    def loss_counts(self, batch: VQBatch) -> dict[str, int]:
        """The numbers of pixels, and of vectors' elements."""
        pixels = {"l1": batch.image.numel(), "mse": batch.image.numel()}
        if self.is_unquantized(batch.number):
            return pixels
        return pixels | dict.fromkeys(("codebook", "commitment"), self._n_codes(batch) * self.model.config.code_dim)

    def step_counts(self, batch: VQBatch) -> StepCounts:
        """Codes, images, FLOPs."""
        n_images, _, height, width = batch.image.shape
        count = StepFlops()
        quantized = not self.is_unquantized(batch.number)
        z = emu3_vq_encode_flops(count, self.model, n_images, (height, width), quantized=quantized)
        emu3_vq_decode_flops(count, self.model, n_images, (height, width), carries=z)
        return StepCounts(tokens=self._n_codes(batch), images=n_images, flops=count.total)

    def _n_codes(self, batch: VQBatch) -> int:
        n_images, _, height, width = batch.image.shape
        return n_images * height * width // self.model.config.stride**2

    def sample_image(self) -> Image.Image:
        """Eight test scenes above their reconstructions."""
        image = held_out_scenes(self.options.tasks, 8, self.batch.seed)[1]
        return tensor_grid(torch.cat([image, self._reconstruct(image)]), columns=8)

    def _reconstruct(self, image: Tensor) -> Tensor:
        device = self.model.quantize.embedding.weight.device
        return self.model.decode(self.model.encode_ids(image.to(device))).cpu()

    def save(self, folder: Path) -> None:
        """Write model.safetensors and config.json, and scores of test scenes."""
        save_emu3_vq(self.model, folder, parse_dtype(self.options.dtype))
        scenes, image = held_out_scenes(self.options.tasks, self.options.scored_scenes, self.batch.seed)
        write_json(folder / "report.json", reconstruction_scores(self._reconstruct, scenes, image), indent=None)


def reconstruction_losses(decoded: Tensor, image: Tensor) -> dict[str, LossSum]:
    """L1 and squared error of pixels."""
    error = decoded.float() - image
    return {"l1": LossSum.over(error.abs()), "mse": LossSum.over(error.square())}


@torch.no_grad()
def begin_codebook(quantize: NearestCodeQuantizer, z: Tensor, generator: torch.Generator) -> None:
    """Let the codes start as vectors of z [B, E, h, w], sampled at random."""
    vectors = rearrange(z, "B E h w -> (B h w) E")
    codebook = quantize.embedding.weight
    sampled = torch.randint(len(vectors), (len(codebook),), generator=generator)
    codebook.copy_(vectors[sampled.to(vectors.device)])


@torch.no_grad()
def revive_unused_codes(quantize: NearestCodeQuantizer, z: Tensor, generator: torch.Generator) -> int:
    """Move codes that no vector of z [B, E, h, w] is nearest to, to some of these vectors, and return how many."""
    codebook = quantize.embedding.weight
    ids = quantize.nearest_ids(z).flatten()
    unused = (torch.bincount(ids, minlength=len(codebook)) == 0).nonzero().flatten()
    vectors = rearrange(z, "B E h w -> (B h w) E").float()
    n = min(len(unused), len(vectors))
    if n:
        sampled = sample_far_vectors(vectors, codebook.float()[ids], n, generator)
        codebook[unused[:n]] = vectors[sampled].to(codebook.dtype)
    return n


def init_emu3_vq(config: Emu3VQConfig) -> Emu3VQModel:
    """An untrained model whose residual branches add nothing yet, and whose styles leave the norms as they are."""
    vq = Emu3VQModel(config)
    for name, x in vq.named_parameters():
        if x.ndim >= 4:
            nn.init.kaiming_normal_(x, nonlinearity="linear")
        if name.endswith(("conv2.weight", "conv2.conv.weight", "proj_out.weight", "bias", "conv_y.weight")):
            nn.init.zeros_(x)
        if name.endswith(("conv_b.weight",)):
            nn.init.zeros_(x)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "norm_layer.weight", "conv_y.bias")):
            nn.init.ones_(x)
    nn.init.normal_(vq.quantize.embedding.weight)
    return vq


def save_emu3_vq(vq: Emu3VQModel, folder: Path, dtype: torch.dtype) -> None:
    """Write weights and config of the tokenizer in the released layout; the statistics of its norms stay as they are."""
    statistics = {own_name(name) for name, _ in vq.named_buffers()}
    weights = {name: x if name in statistics else x.to(dtype) for name, x in own_state_dict(vq).items()}
    save_safetensors(weights, folder / "model.safetensors")
    write_json(folder / "config.json", vq.config.to_json())
