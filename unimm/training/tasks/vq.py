"""Training the VQ autoencoder on the little world: L1 and squared error, the two pulls of code and vector, entropy.

LlamaGen (arXiv 2406.06525, section 2.1) also has a perceptual and an adversarial loss, which need pretrained networks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unimm.data.batching import image_to_uint8
from unimm.data.shapes.scenes import reconstruction_scores, render_augmented, target_scenes, test_scenes
from unimm.tokenizers.vq import VectorQuantizer, VQConfig, VQModel
from unimm.training.config import TrainConfig, strict
from unimm.training.tasks.kl_vae import DTYPES


@dataclass(frozen=True, kw_only=True)
class VQTrainingConfig:
    """What the recipe's `options` may say."""

    # tasks of unimm.data.shapes that end in a picture, in turn
    tasks: tuple[str, ...]
    # the part of things in colours of no name, and of shapes of no name: so that pairs never shown come out right, too
    novel_colours: float
    novel_shapes: float
    # the part of pictures that are fuller than any task's, with five to nine things: most of a plain one is background
    crowded: float
    # of the softmax over codes that the entropy is taken of
    temperature: float
    # so many steps are trained without the codebook, which then starts from the vectors there are: what vectors say at the
    # start is how bright a place is, and codes chosen then keep out colours for long
    unquantized_steps: int
    # every so many steps, in the first `revived` part of them, codes that were not chosen lately move to where vectors are
    revive_every: int
    revive_fraction: float
    # test scenes that the report is about
    scored_scenes: int
    # type of the released weights
    dtype: str
    # holds the vq.safetensors to start from; null: a fresh one
    init_from: str | None
    # parts that stay as they are, by the beginning of their parameters' names: with encoder, quant_conv and quantize the
    # ids of every picture stay, and a decoder learns to draw them better
    frozen: tuple[str, ...]
    # "off" and nothing else
    perceptual: Any = "off"
    adversarial: Any = "off"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"got dtype {self.dtype!r}, expected one of {list(DTYPES)}: correct the recipe's options")
        for name, network in (("perceptual", "pretrained VGG features"), ("adversarial", "a trained discriminator")):
            # YAML reads a bare off as False
            if getattr(self, name) not in ("off", False):
                raise ValueError(
                    f"got {name}: {getattr(self, name)}, expected off: the {name} loss is not available, since it needs "
                    f"{network}, which this package does not bring"
                )
        if not self.temperature > 0 or self.revive_every < 1 or not 0 <= self.revive_fraction <= 1:
            raise ValueError(
                f"got temperature {self.temperature}, revive_every {self.revive_every}, revived {self.revive_fraction}, expected "
                f"a positive number, at least 1, and 0 to 1: correct the recipe's options"
            )


@dataclass(frozen=True, kw_only=True)
class VQArchitecture:
    """What the recipe's `model` may say: the numbers of VQConfig."""

    width: int
    multipliers: tuple[int, ...]
    n_blocks: int
    latent_channels: int
    n_codes: int
    code_dim: int

    def config(self) -> VQConfig:
        """The config of a model of these numbers."""
        return VQConfig(
            width=self.width, channel_multipliers=self.multipliers, n_res_blocks=self.n_blocks, latent_channels=self.latent_channels,
            n_codes=self.n_codes, code_dim=self.code_dim,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VQBatch:
    """image [B, 3, H, W] in [-1, 1], and the step it is for."""

    image: Tensor
    step: int


@dataclass(frozen=True, kw_only=True)
class VQDataset:
    """Batches of train scenes, some of whose things have no name, by step."""

    options: VQTrainingConfig
    batch_size: int
    seed: int

    def __call__(self, step: int) -> VQBatch:
        rng = Random(f"{self.seed}/{step}/vq")
        chosen = target_scenes(
            self.options.tasks, range(step * self.batch_size, (step + 1) * self.batch_size), seed=self.seed
        )
        part = self.options
        image = render_augmented(
            chosen, rng, colours=part.novel_colours, shapes=part.novel_shapes, crowded=part.crowded
        )
        return VQBatch(image=image, step=step)


def codebook_entropy(z: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Mean entropy of each vector's choice less that of the mean choice, in nats; small where choices are sure and even.

    z [B, E, h, w], codebook [V, E]; a choice is the softmax of -|z - e|^2 / temperature over codes, all of length 1.
    """
    unit = F.normalize(rearrange(z, "B E h w -> (B h w) E").float(), dim=1)
    # of unit vectors |z - e|^2 = 2 - 2 z e, and what all codes share falls out of the softmax
    logs = (2 * unit @ F.normalize(codebook.float(), dim=1).t() / temperature).log_softmax(1)
    mean = logs.exp().mean(0)
    return -(logs.exp() * logs).sum(1).mean() + (mean * mean.clamp_min(1e-9).log()).sum()


@torch.no_grad()
def record_codes(quantize: VectorQuantizer, ids: Tensor) -> None:
    """Append ids to the window of those chosen last."""
    used = quantize.codebook_used
    last = ids.flatten()[-len(used) :].to(used.dtype)
    used.copy_(torch.cat([used, last])[-len(used) :])


@torch.no_grad()
def revive_codes(quantize: VectorQuantizer, z: Tensor, generator: torch.Generator) -> int:
    """Move codes that are not among those chosen last to vectors of z [B, E, h, w], and say how many.

    Vectors are drawn by their squared distance from their codes, as k-means++ draws centres: what is badly coded wins.
    """
    codebook, used = quantize.embedding.weight, quantize.codebook_used
    chosen = torch.bincount(used[used >= 0].long(), minlength=len(codebook))
    dead = (chosen == 0).nonzero().flatten()
    vectors = F.normalize(rearrange(z, "B E h w -> (B h w) E").float(), dim=1)
    codes = F.normalize(codebook.float(), dim=1)[quantize.nearest_ids(z).flatten()]
    # a little more than nothing, so that there are enough to draw
    weights = (vectors - codes).square().sum(1).double().cpu() + 1e-9
    n = min(len(dead), len(vectors))
    if n:
        drawn = torch.multinomial(weights, n, generator=generator).to(vectors.device)
        codebook[dead[:n]] = vectors[drawn].to(codebook.dtype)
    return n


class VQLosses:
    """The losses of a VQ autoencoder on a batch; in training, it also keeps the codebook alive."""

    def __init__(self, vq: VQModel, options: VQTrainingConfig, recipe: TrainConfig) -> None:
        self.vq, self.options, self.seed = vq, options, recipe.seed
        self.revive_until = round(options.revive_fraction * recipe.steps)
        # the softmax over all codes is dear where there are 16384 of them
        self.has_entropy = recipe.loss_weights.get("entropy", 0.0) > 0

    def __call__(self, image: Tensor, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """image [B, 3, H, W] -> losses, and the codes [B, E, h, w] that it was drawn from.

        Every loss is a mean: over pixels for l1 and mse, over numbers of vectors for codebook and commitment. The first
        `free` steps have the first two only.
        """
        vq, options = self.vq, self.options
        z = vq.encode(image)
        free = vq.training and step < options.unquantized_steps
        due = step == options.unquantized_steps or (
            options.unquantized_steps < step < self.revive_until and step % options.revive_every == 0
        )
        if vq.training and due and vq.quantize.embedding.weight.requires_grad:
            revive_codes(vq.quantize, z, torch.Generator().manual_seed(self.seed * 2**32 + step))
        found = vq.quantize(z)
        codes = F.normalize(z, dim=1) if free else found.codes
        error = vq.decode_codes(codes).float() - image
        losses = {"l1": error.abs().mean(), "mse": error.square().mean()}
        if not free:
            losses |= {"codebook": found.codebook_loss, "commitment": found.commitment_loss}
            if vq.training:
                record_codes(vq.quantize, found.ids)
        if self.has_entropy and not free:
            losses["entropy"] = codebook_entropy(z, vq.quantize.embedding.weight, options.temperature)
        return losses, codes


def init_vq(config: VQConfig) -> VQModel:
    """An untrained model whose residual branches add nothing yet, and of which no code was chosen yet.

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


def starting_vq(config: VQConfig, options: VQTrainingConfig, seed: int) -> VQModel:
    """The model that training starts with: fresh or from the folder that the options name, some parts frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vq = init_vq(config)
    if options.init_from is not None:
        path = Path(options.init_from) / "vq.safetensors"
        if not path.is_file():
            raise ValueError(
                f"no vq.safetensors in {path.parent}: run `unimm train janus-nano-vq {path.parent.parent}`"
            )
        vq.load_state_dict(load_file(path))
    for part in options.frozen:
        found = [p for name, p in vq.named_parameters() if name.startswith(part)]
        if not found:
            raise ValueError(
                f"got frozen: {part}, which begins the name of no parameter: expected encoder, quantize, ..."
            )
        for p in found:
            p.requires_grad_(False)
    return vq


class VQTask:
    """Reconstruct through a codebook."""

    name = "vq"
    loss_names = ("l1", "mse", "codebook", "commitment", "entropy")

    def __init__(self, model: VQModel, options: VQTrainingConfig, recipe: TrainConfig) -> None:
        self.model, self.options, self.seed = model, options, recipe.seed
        self.terms = VQLosses(self.model, options, recipe)
        self.batch = VQDataset(options=options, batch_size=recipe.batch_size, seed=recipe.seed)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> VQTask:
        config = strict(VQArchitecture, recipe.model, where="model of the recipe").config()
        options = strict(VQTrainingConfig, recipe.options, where="options of the recipe")
        return cls(starting_vq(config, options, recipe.seed), options, recipe)

    def losses(self, batch: VQBatch) -> dict[str, Tensor]:
        """Mean losses by name; entropy only where it has a weight."""
        return self.terms(batch.image.to(next(self.model.parameters()).device), batch.step)[0]

    def sample_image(self) -> Image.Image:
        """Eight test scenes above their reconstructions, and eight train scenes with nameless things above theirs."""
        return reconstruction_grid(self.model, self.options, self.batch, self.seed)

    def save(self, folder: Path) -> None:
        """vq.safetensors and vq_config.json, and a report of what became of test scenes."""
        save_vq(self.model, folder, DTYPES[self.options.dtype])
        (folder / "report.json").write_text(json.dumps(vq_report(self.model, self.options, self.seed)) + "\n")


def save_vq(vq: VQModel, folder: Path, dtype: torch.dtype) -> None:
    """Weights and config of the autoencoder, under the names that they have inside a released Janus."""
    kept = {name for name, _ in vq.named_buffers()}
    weights = {name: x if name in kept else x.to(dtype) for name, x in vq.state_dict().items()}
    save_file({name: x.detach().contiguous().cpu() for name, x in weights.items()}, folder / "vq.safetensors")
    files = {"cls": "VQ-16", "model_type": "gen_vision", "params": vq.config.to_json()}
    (folder / "vq_config.json").write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def reconstruct(vq: VQModel, image: Tensor) -> tuple[Tensor, Tensor]:
    """image [B, 3, H, W] -> its ids [B, n], and the image that they stand for."""
    ids = vq.encode_ids(image)
    grid = (image.shape[2] // vq.config.stride, image.shape[3] // vq.config.stride)
    return ids, vq.decode(ids, grid=grid)


def reconstruction_grid(vq: VQModel, options: VQTrainingConfig, batch: VQDataset, seed: int) -> Image.Image:
    """Rows of pictures: test scenes, what comes of them, train scenes with nameless things, what comes of them."""
    plain, odd = (
        test_scenes(options.tasks, 8, seed)[1],
        VQDataset(options=options, batch_size=8, seed=seed)(batch.batch_size).image,
    )
    device = next(vq.parameters()).device
    rows = [part for image in (plain, odd) for part in (image, reconstruct(vq, image.to(device))[1].cpu())]
    return Image.fromarray(
        rearrange(image_to_uint8(torch.cat(rows)), "(row column) H W C -> (row H) (column W) C", column=8)
    )


def vq_report(vq: VQModel, options: VQTrainingConfig, seed: int) -> dict[str, float]:
    """Of test scenes: the part that is read back fully right, decibels, and how the codebook is used.

    `perplexity` is the number of codes that, chosen evenly, would be as hard to guess.
    """
    found, image = test_scenes(options.tasks, options.scored_scenes, seed)
    device, counts = next(vq.parameters()).device, torch.zeros(vq.config.n_codes, dtype=torch.long)

    def redrawn(part: Tensor) -> Tensor:
        ids, drawn = reconstruct(vq, part.to(device))
        counts.add_(torch.bincount(ids.flatten().cpu(), minlength=len(counts)))
        return drawn

    back = reconstruction_scores(redrawn, found, image)
    share = counts[counts > 0] / counts.sum()
    return back | {
        "codes": len(counts),
        "codes_used": int((counts > 0).sum()),
        "perplexity": float((-share * share.log()).sum().exp()),
    }
