"""Training a KL autoencoder on the shapes world: L1 and squared error, and a light KL term towards the normal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.load import parse_dtype
from unimm.checkpoint.save import own_state_dict, save_safetensors
from unimm.data.batching import uint8_to_image
from unimm.data.shapes import example
from unimm.nn.flops import StepFlops
from unimm.tokenizers.flops import kl_decode_flops, kl_encode_flops
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig
from unimm.training.config import RecipeSection, TrainConfig, from_mapping
from unimm.training.fields import AtLeastOne, Dtype, ImageTasks, Multipliers, WorldImageSize, grid_side, held_out_seed
from unimm.training.losses import LossSum
from unimm.training.samples import tensor_grid
from unimm.training.throughput import StepCounts

# images whose latents are measured in one call
MEASURED_TOGETHER = 64


@dataclass(frozen=True, kw_only=True)
class KLTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # tasks of unimm.data.shapes whose target is an image, in turn
    tasks: ImageTasks
    # of the images' sides, in pixels
    image_size: WorldImageSize
    # train scenes that scale and shift are measured on
    measured_scenes: AtLeastOne
    # of the released weights
    dtype: Dtype


@dataclass(frozen=True, kw_only=True)
class KLArchitecture(RecipeSection):
    """The recipe's `model`: the numbers of AutoencoderKLConfig, but for those that are measured."""

    width: AtLeastOne
    multipliers: Multipliers
    n_blocks: AtLeastOne
    latent_channels: AtLeastOne

    def config(self) -> AutoencoderKLConfig:
        """The config of a model of these numbers: latents are trained as they are, and measured in the end."""
        return AutoencoderKLConfig(
            width=self.width,
            channel_multipliers=self.multipliers,
            n_res_blocks=self.n_blocks,
            latent_channels=self.latent_channels,
            scaling_factor=1.0,
            shift_factor=0.0,
        )


@dataclass(frozen=True, kw_only=True)
class KLBatch:
    """image [B, 3, h, w] in [-1, 1] and the noise [B, C, h', w'] of the posterior."""

    image: Tensor
    noise: Tensor


@dataclass(frozen=True, kw_only=True)
class KLDataset:
    """Batches of train scenes, by step."""

    tasks: tuple[str, ...]
    batch_size: int
    latent_shape: tuple[int, int, int]
    seed: int

    def __call__(self, step: int) -> KLBatch:
        first = step * self.batch_size
        generator = torch.Generator().manual_seed(self.seed * 2**32 + step)
        noise = torch.randn(self.batch_size, *self.latent_shape, generator=generator)
        image = target_images(self.tasks, range(first, first + self.batch_size), seed=self.seed)
        return KLBatch(image=image, noise=noise)


def target_images(tasks: tuple[str, ...], indices: range, *, seed: int, split: str = "train") -> Tensor:
    """Targets of examples number `indices`, of the tasks in turn, [B, 3, h, w] in [-1, 1]."""
    targets = [example(tasks[i % len(tasks)], i // len(tasks), seed=seed, split=split).target for i in indices]
    return uint8_to_image(np.stack([target for target in targets if target is not None]))


class KLLossTask:
    """The half of both KL tasks: the losses of images that are reconstructed through a sample of the posterior."""

    name = "vae"
    loss_names = ("l1", "mse", "kl")
    # its scale is 1 and its shift 0 while it is trained: latents are measured in the end
    model: AutoencoderKL
    seed: int

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def losses(self, batch: KLBatch) -> dict[str, LossSum]:
        """Losses: l1 and mse over pixels, kl (to the standard normal, in nats) over latents."""
        image = batch.image.to(self.device)
        noise = batch.noise.to(self.device)
        mean, logvar = (part.float() for part in self.model.moments(image))
        error = self.model.decode(mean + torch.exp(0.5 * logvar) * noise).float() - image
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return {"l1": LossSum.over(error.abs()), "mse": LossSum.over(error.square()), "kl": LossSum.over(kl)}

    def loss_counts(self, batch: KLBatch) -> dict[str, int]:
        """The numbers of pixels and of latents."""
        return {"l1": batch.image.numel(), "mse": batch.image.numel(), "kl": batch.noise.numel()}

    def step_counts(self, batch: KLBatch) -> StepCounts:
        """Positions of the latents, images, FLOPs."""
        n_images, _, height, width = batch.image.shape
        count = StepFlops()
        latents = kl_encode_flops(count, self.model, n_images, (height, width))
        kl_decode_flops(count, self.model, n_images, (height, width), carries=latents)
        return StepCounts(tokens=batch.noise[:, 0].numel(), images=n_images, flops=count.total)

    def measure_scale(self, images: Iterable[Tensor]) -> AutoencoderKLConfig:
        """The config, with scale = 1 / std and shift = mean of sampled latents of images [B, 3, h, w] in [-1, 1]."""
        generator = torch.Generator().manual_seed(self.seed)
        total = 0.0
        square = 0.0
        count = 0
        for image in images:
            mean, logvar = self.model.moments(image.to(self.device))
            noise = torch.randn(mean.shape, generator=generator).to(self.device)
            z = (mean + torch.exp(0.5 * logvar) * noise).double()
            total += z.sum().item()
            square += z.square().sum().item()
            count += z.numel()
        average = total / count
        return replace(self.model.config, scaling_factor=(square / count - average**2) ** -0.5, shift_factor=average)


class KLTask(KLLossTask):
    """Reconstruct images of the shapes world through a sample of the posterior."""

    def __init__(self, config: AutoencoderKLConfig, options: KLTrainingConfig, *, batch_size: int, seed: int) -> None:
        self.options = options
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = AutoencoderKL(config)
        grid = grid_side(config.stride, "a stride of")
        shape = (config.latent_channels, grid, grid)
        self.batch = KLDataset(tasks=options.tasks, batch_size=batch_size, latent_shape=shape, seed=seed)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> KLTask:
        """Build a model of the recipe's numbers."""
        config = from_mapping(KLArchitecture, recipe.model, where="model of the recipe").config()
        options = from_mapping(KLTrainingConfig, recipe.options, where="options of the recipe")
        return cls(config, options, batch_size=recipe.batch_size, seed=recipe.seed)

    @property
    def held_out_batch(self) -> KLDataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image:
        """Eight test scenes above their reconstructions."""
        image = target_images(self.options.tasks, range(8), seed=self.seed, split="test").to(self.device)
        return tensor_grid(torch.cat([image, self.model.decode(self.model.encode(image))]), columns=8)

    def save(self, folder: Path) -> None:
        """Write ae.safetensors and vae_config.json, with the scale and shift that standardise latents of train scenes."""
        n = self.options.measured_scenes
        parts = (range(first, min(first + MEASURED_TOGETHER, n)) for first in range(0, n, MEASURED_TOGETHER))
        images = (target_images(self.options.tasks, part, seed=self.seed) for part in parts)
        save_kl(self.model, self.measure_scale(images), folder, parse_dtype(self.options.dtype))


def save_kl(vae: AutoencoderKL, config: AutoencoderKLConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write weights as ae.safetensors, and a config as vae_config.json."""
    weights = {name: x.to(dtype) for name, x in own_state_dict(vae).items()}
    save_safetensors(weights, folder / "ae.safetensors")
    write_json(folder / "vae_config.json", config.to_json(), indent=1)
