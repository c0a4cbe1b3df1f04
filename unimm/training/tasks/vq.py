"""Training a VQ autoencoder on the shapes world: L1 and squared error, codebook and commitment losses, entropy.

LlamaGen (arXiv 2406.06525, section 2.1) also has a perceptual and an adversarial loss, which need pretrained networks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.load import parse_dtype
from unimm.checkpoint.save import own_name, own_state_dict, save_safetensors
from unimm.data.shapes.scenes import held_out_scenes, reconstruction_scores, render_augmented, target_scenes
from unimm.distributed.ranks import world_size
from unimm.nn.flops import StepFlops
from unimm.tokenizers.flops import vq_decode_flops, vq_encode_flops
from unimm.tokenizers.vq import VectorQuantizer, VQConfig, VQModel
from unimm.training.config import RecipeSection, TrainConfig, from_mapping
from unimm.training.fields import (
    AtLeastOne,
    Dtype,
    Fraction,
    ImageTasks,
    Multipliers,
    NoneOrMore,
    Positive,
    held_out_seed,
)
from unimm.training.freezing import freeze
from unimm.training.init import load_trained, trained_file
from unimm.training.losses import LossSum
from unimm.training.samples import tensor_grid
from unimm.training.throughput import StepCounts


@dataclass(frozen=True, kw_only=True)
class VQCommonConfig(RecipeSection):
    """What the recipe's `options` are with `data` and without."""

    # of the softmax over codes that the entropy is taken of
    temperature: Positive
    # so many steps are trained without the codebook, which then starts from the vectors of a batch: at the start
    # vectors tell brightness alone, and codes chosen then leave out colours for long
    unquantized_steps: NoneOrMore
    # every so many steps, in the first `revive_fraction` of them, codes that were not used lately move to vectors
    revive_every: AtLeastOne
    revive_fraction: Fraction
    # of the released weights
    dtype: Dtype
    # a folder whose vq.safetensors to start from; null: an untrained one
    init_from: str | None
    # prefixes of the names of parameters that are not trained: with encoder, quant_conv and quantize the ids of every
    # image stay, and a decoder learns to decode them better
    frozen: tuple[str, ...]
    # "off" and nothing else
    perceptual: Any = "off"
    adversarial: Any = "off"

    def __post_init__(self) -> None:
        for name, network in (("perceptual", "pretrained VGG features"), ("adversarial", "a trained discriminator")):
            # YAML reads a bare off as False
            if getattr(self, name) not in ("off", False):
                raise ValueError(
                    f"got {name}: {getattr(self, name)}, expected off: the {name} loss is not available: it needs "
                    f"{network}, which this package does not bring"
                )


@dataclass(frozen=True, kw_only=True)
class VQTrainingConfig(VQCommonConfig):
    """The recipe's `options`, without `data`: on the shapes world."""

    # tasks of unimm.data.shapes whose target is an image, in turn
    tasks: ImageTasks
    # the part of things with novel colours, and with novel shapes, so that held-out pairs are reconstructed, too
    novel_colours: Fraction
    novel_shapes: Fraction
    # the part of scenes with five to nine things, more than any task has: most of a plain one is background
    crowded: Fraction
    # test scenes that are scored
    scored_scenes: AtLeastOne


@dataclass(frozen=True, kw_only=True)
class VQArchitecture(RecipeSection):
    """The recipe's `model`: the numbers of VQConfig."""

    width: AtLeastOne
    multipliers: Multipliers
    n_blocks: AtLeastOne
    latent_channels: AtLeastOne
    n_codes: AtLeastOne
    code_dim: AtLeastOne

    def config(self) -> VQConfig:
        """The config of a model of these numbers."""
        return VQConfig(
            width=self.width,
            channel_multipliers=self.multipliers,
            n_res_blocks=self.n_blocks,
            latent_channels=self.latent_channels,
            n_codes=self.n_codes,
            code_dim=self.code_dim,
        )


@dataclass(frozen=True, kw_only=True)
class VQBatch:
    """image [B, 3, h, w] in [-1, 1], and the number of the batch."""

    image: Tensor
    number: int = 0

    def with_number(self, number: int) -> VQBatch:
        """The batch, which has this number."""
        return replace(self, number=number)


@dataclass(frozen=True, kw_only=True)
class VQDataset:
    """Batches of augmented train scenes, by number."""

    options: VQTrainingConfig
    batch_size: int
    seed: int

    def __call__(self, number: int) -> VQBatch:
        options = self.options
        indices = range(number * self.batch_size, (number + 1) * self.batch_size)
        image = render_augmented(
            target_scenes(options.tasks, indices, seed=self.seed),
            Random(f"{self.seed}/{number}/vq"),
            colours=options.novel_colours,
            shapes=options.novel_shapes,
            crowded=options.crowded,
        )
        return VQBatch(image=image, number=number)


def codebook_entropy(z: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Mean entropy of each vector's choice less that of the mean choice, in nats: small if choices are sure and even.

    z [B, C, h, w], codebook [V, C]; a choice is the softmax of -|z - e|^2 / temperature over codes, all of length 1.
    """
    unit = F.normalize(rearrange(z, "B C h w -> (B h w) C").float(), dim=1)
    # of unit vectors |z - e|^2 = 2 - 2 z e, and what all codes share falls out of the softmax
    logs = (2 * unit @ F.normalize(codebook.float(), dim=1).t() / temperature).log_softmax(1)
    mean = logs.exp().mean(0)
    return -(logs.exp() * logs).sum(1).mean() + (mean * mean.clamp_min(1e-9).log()).sum()


@torch.no_grad()
def record_codes(quantize: VectorQuantizer, ids: Tensor) -> None:
    """Append ids to the window of those that were used last."""
    used = quantize.codebook_used
    last = ids.flatten()[-len(used) :].to(used.dtype)
    used.copy_(torch.cat([used, last])[-len(used) :])


def sample_far_vectors(vectors: Tensor, codes: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Indices [n] of vectors [N, C], sampled by their squared distance from their codes [N, C], without replacement.

    k-means++ samples centres so: Arthur and Vassilvitskii 2007.
    """
    # a little more than nothing, so that there are enough to sample
    weights = (vectors - codes).square().sum(1).double().cpu() + 1e-9
    return torch.multinomial(weights, n, generator=generator).to(vectors.device)


@torch.no_grad()
def revive_codes(quantize: VectorQuantizer, z: Tensor, generator: torch.Generator) -> int:
    """Move codes that are not among those used last to vectors of z [B, C, h, w], and return how many."""
    codebook = quantize.embedding.weight
    used = quantize.codebook_used
    n_uses = torch.bincount(used[used >= 0].long(), minlength=len(codebook))
    dead = (n_uses == 0).nonzero().flatten()
    vectors = F.normalize(rearrange(z, "B C h w -> (B h w) C").float(), dim=1)
    codes = F.normalize(codebook.float(), dim=1)[quantize.nearest_ids(z).flatten()]
    n = min(len(dead), len(vectors))
    if n:
        sampled = sample_far_vectors(vectors, codes, n, generator)
        codebook[dead[:n]] = vectors[sampled].to(codebook.dtype)
    return n


def check_one_device() -> None:
    """Raise ValueError where a codebook is to be trained on several devices."""
    if world_size() > 1:
        raise ValueError(
            f"got {world_size()} devices for a codebook that is trained, expected one: unused codes are moved to what a "
            "device saw"
        )


def moves_codes(number: int, *, batches_per_step: int, first: int, every: int, until: int) -> bool:
    """Whether codes are moved before a batch: at the first quantized step, and every so many steps after it."""
    step, place = divmod(number, batches_per_step)
    return not place and (step == first or (first < step < until and step % every == 0))


class VQLosses:
    """The losses of a VQ autoencoder on a batch; in training, it also revives unused codes."""

    def __init__(self, vq: VQModel, options: VQCommonConfig, recipe: TrainConfig) -> None:
        if vq.quantize.embedding.weight.requires_grad:
            check_one_device()
        self.vq = vq
        self.options = options
        self.seed = recipe.seed
        self.revive_until = round(options.revive_fraction * recipe.steps)
        self.batches_per_step = recipe.gradient_accumulation
        # the softmax over all codes is expensive where there are 16384 of them
        self.has_entropy = recipe.loss_weights.get("entropy", 0.0) > 0

    def __call__(self, image: Tensor, number: int) -> tuple[dict[str, LossSum], Tensor]:
        """image [B, 3, h, w] of batch `number` -> losses, and the codes [B, C, h', w'] that it was decoded from.

        They are over pixels for l1 and mse, over the vectors' elements for codebook and commitment, over vectors for
        entropy. The first `unquantized_steps` steps have the first two only.
        """
        vq = self.vq
        z = vq.encode(image)
        if vq.training and self._revives(number) and vq.quantize.embedding.weight.requires_grad:
            revive_codes(vq.quantize, z, torch.Generator().manual_seed(self.seed * 2**32 + number))
        found = vq.quantize(z)
        codes = F.normalize(z, dim=1) if self.is_unquantized(number) else found.codes
        error = vq.decode_codes(codes).float() - image
        losses = {"l1": LossSum.over(error.abs()), "mse": LossSum.over(error.square())}
        if self.is_unquantized(number):
            return losses, codes
        losses["codebook"] = LossSum.from_mean(found.codebook_loss, z.numel())
        losses["commitment"] = LossSum.from_mean(found.commitment_loss, z.numel())
        if vq.training:
            record_codes(vq.quantize, found.ids)
        if self.has_entropy:
            entropy = codebook_entropy(z, vq.quantize.embedding.weight, self.options.temperature)
            losses["entropy"] = LossSum.from_mean(entropy, z.numel() // z.shape[1])
        return losses, codes

    def is_unquantized(self, number: int) -> bool:
        """Whether the vectors of a batch are decoded as they are."""
        return self.vq.training and number // self.batches_per_step < self.options.unquantized_steps

    def counts(self, image: Tensor, number: int) -> dict[str, int]:
        """The count of each of the losses."""
        pixels = {"l1": image.numel(), "mse": image.numel()}
        if self.is_unquantized(number):
            return pixels
        config = self.vq.config
        n_vectors = len(image) * (image.shape[2] // config.stride) * (image.shape[3] // config.stride)
        vectors = dict.fromkeys(("codebook", "commitment"), n_vectors * config.code_dim)
        return pixels | vectors | ({"entropy": n_vectors} if self.has_entropy else {})

    def _revives(self, number: int) -> bool:
        """Whether unused codes are moved before this batch: at the first quantized step, and at times after it."""
        return moves_codes(
            number,
            batches_per_step=self.batches_per_step,
            first=self.options.unquantized_steps,
            every=self.options.revive_every,
            until=self.revive_until,
        )


def init_vq(config: VQConfig) -> VQModel:
    """An untrained model whose residual branches add nothing yet, and of which no code was used yet.

    With branches of torch's own random start the squared error after 150 steps of the recipe was twice as large.
    """
    vq = VQModel(config)
    for name, x in vq.named_parameters():
        if x.ndim == 4:
            nn.init.kaiming_normal_(x, nonlinearity="linear")
        if name.endswith(("conv2.weight", "proj_out.weight", "bias")):
            nn.init.zeros_(x)
    vq.quantize.codebook_used.fill_(-1)
    return vq


def starting_vq(config: VQConfig, options: VQCommonConfig, seed: int) -> VQModel:
    """The model that training starts with: untrained or from the folder that the options name, some parts frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vq = init_vq(config)
    if options.init_from is not None:
        load_trained(vq, trained_file(options.init_from, "vq.safetensors", "janus-nano-vq"))
    freeze(vq, options.frozen)
    return vq


class VQLossTask:
    """The half of both VQ tasks: the losses of images that are reconstructed through a codebook."""

    name = "vq"
    loss_names = ("l1", "mse", "codebook", "commitment", "entropy")

    def __init__(self, model: VQModel, options: VQCommonConfig, recipe: TrainConfig) -> None:
        self.model = model
        self.options = options
        self.compute_losses = VQLosses(model, options, recipe)

    def losses(self, batch: VQBatch) -> dict[str, LossSum]:
        """Losses by name; entropy only where it has a weight."""
        return self.compute_losses(batch.image.to(next(self.model.parameters()).device), batch.number)[0]

    def loss_counts(self, batch: VQBatch) -> dict[str, int]:
        """The numbers of pixels, of vectors' elements and of vectors."""
        return self.compute_losses.counts(batch.image, batch.number)

    def step_counts(self, batch: VQBatch) -> StepCounts:
        """Codes, images, FLOPs."""
        n_images, _, height, width = batch.image.shape
        n_codes = n_images * height * width // self.model.config.stride**2
        count = StepFlops()
        z = vq_encode_flops(count, self.model, n_images, (height, width))
        if self.compute_losses.has_entropy and not self.compute_losses.is_unquantized(batch.number):
            count.matrix(self.model.quantize.embedding.weight, n_codes, z)
        vq_decode_flops(count, self.model, n_images, (height, width), carries=z)
        return StepCounts(tokens=n_codes, images=n_images, flops=count.total)


class VQTask(VQLossTask):
    """Reconstruct images of the shapes world through a codebook."""

    options: VQTrainingConfig

    def __init__(self, model: VQModel, options: VQTrainingConfig, recipe: TrainConfig) -> None:
        super().__init__(model, options, recipe)
        self.batch = VQDataset(options=options, batch_size=recipe.batch_size, seed=recipe.seed)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> VQTask:
        """Build a model of the recipe's numbers, or start from a trained one."""
        config = from_mapping(VQArchitecture, recipe.model, where="model of the recipe").config()
        options = from_mapping(VQTrainingConfig, recipe.options, where="options of the recipe")
        return cls(starting_vq(config, options, recipe.seed), options, recipe)

    @property
    def held_out_batch(self) -> VQDataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image:
        """Eight test scenes above their reconstructions, and eight augmented train scenes above theirs."""
        return reconstruction_grid(self.model, self.batch)

    def save(self, folder: Path) -> None:
        """Write vq.safetensors and vq_config.json, and scores of test scenes."""
        save_vq(self.model, folder, parse_dtype(self.options.dtype))
        report = vq_report(self.model, self.options, self.batch.seed)
        write_json(folder / "report.json", report, indent=None)


def save_vq(vq: VQModel, folder: Path, dtype: torch.dtype) -> None:
    """Write weights and config of the autoencoder, under the names that they have inside a released Janus."""
    buffers = {own_name(name) for name, _ in vq.named_buffers()}
    weights = {name: x if name in buffers else x.to(dtype) for name, x in own_state_dict(vq).items()}
    save_safetensors(weights, folder / "vq.safetensors")
    files = {"cls": "VQ-16", "model_type": "gen_vision", "params": vq.config.to_json()}
    write_json(folder / "vq_config.json", files, indent=1)


def reconstruct(vq: VQModel, image: Tensor) -> tuple[Tensor, Tensor]:
    """image [B, 3, h, w] -> its ids [B, n], and the image that they decode to."""
    ids = vq.encode_ids(image)
    grid = (image.shape[2] // vq.config.stride, image.shape[3] // vq.config.stride)
    return ids, vq.decode(ids, grid=grid)


def reconstruction_grid(vq: VQModel, batch: VQDataset) -> Image.Image:
    """Rows of eight: test scenes, their reconstructions, augmented train scenes, theirs."""
    plain = held_out_scenes(batch.options.tasks, 8, batch.seed)[1]
    augmented = replace(batch, batch_size=8)(batch.batch_size).image
    device = next(vq.parameters()).device
    rows = [part for image in (plain, augmented) for part in (image, reconstruct(vq, image.to(device))[1].cpu())]
    return tensor_grid(torch.cat(rows), columns=8)


def vq_report(vq: VQModel, options: VQTrainingConfig, seed: int) -> dict[str, float]:
    """Scores of reconstructed test scenes, and how the codebook is used.

    `perplexity` is the number of codes that, used evenly, would have the same entropy.
    """
    scenes, image = held_out_scenes(options.tasks, options.scored_scenes, seed)
    device = next(vq.parameters()).device
    counts = torch.zeros(vq.config.n_codes, dtype=torch.long)

    def reconstruct_and_count(part: Tensor) -> Tensor:
        ids, reconstruction = reconstruct(vq, part.to(device))
        counts.add_(torch.bincount(ids.flatten().cpu(), minlength=len(counts)))
        return reconstruction

    scores = reconstruction_scores(reconstruct_and_count, scenes, image)
    frequency = counts[counts > 0] / counts.sum()
    return scores | {
        "codes": len(counts),
        "codes_used": int((counts > 0).sum()),
        "perplexity": float((-frequency * frequency.log()).sum().exp()),
    }
