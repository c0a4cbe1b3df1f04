"""Training the autoencoder on the little world: L1 and squared error, and a light pull towards the normal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from unimm.data.batching import image_to_uint8, uint8_to_image
from unimm.data.shapes import example
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig
from unimm.training.config import TrainConfig, strict

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class KLTrainingConfig:
    """What the recipe's `options` may say."""

    # tasks of unimm.data.shapes that end in a picture, in turn
    tasks: tuple[str, ...]
    image_size: int
    # train scenes that scale and shift are measured over
    measured_scenes: int
    # type of the released weights
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"got dtype {self.dtype!r}, expected one of {list(DTYPES)}: correct the recipe's options")


@dataclass(frozen=True, kw_only=True)
class KLArchitecture:
    """What the recipe's `model` may say: the numbers of VAEConfig, but for those that are measured."""

    width: int
    multipliers: tuple[int, ...]
    n_blocks: int
    latent_channels: int


@dataclass(frozen=True, kw_only=True)
class KLBatch:
    """image [B, 3, H, W] in [-1, 1] and the noise [B, C, h, w] of the posterior."""

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
        return KLBatch(
            image=target_images(self.tasks, range(first, first + self.batch_size), seed=self.seed), noise=noise
        )


def target_images(tasks: tuple[str, ...], indices: range, *, seed: int, split: str = "train") -> Tensor:
    """Targets number `indices` of the tasks in turn, [B, 3, H, W] in [-1, 1]."""
    targets = [example(tasks[i % len(tasks)], i // len(tasks), seed=seed, split=split).target for i in indices]
    return uint8_to_image(np.stack([target for target in targets if target is not None]))


class KLTask:
    """Reconstruct through a sampled posterior."""

    name = "vae"
    loss_names = ("l1", "mse", "kl")

    def __init__(self, config: AutoencoderKLConfig, options: KLTrainingConfig, *, batch: int, seed: int) -> None:
        self.options, self.seed = options, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = AutoencoderKL(config)
        grid = options.image_size // config.stride
        shape = (config.latent_channels, grid, grid)
        self.batch = KLDataset(tasks=options.tasks, batch_size=batch, latent_shape=shape, seed=seed)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> KLTask:
        part = strict(KLArchitecture, recipe.model, where="model of the recipe")
        # latents are trained as they come; scale and shift are measured in the end
        config = AutoencoderKLConfig(
            width=part.width, channel_multipliers=part.multipliers, n_res_blocks=part.n_blocks,
            latent_channels=part.latent_channels, scaling_factor=1.0, shift_factor=0.0,
        )  # fmt: skip
        options = strict(KLTrainingConfig, recipe.options, where="options of the recipe")
        return cls(config, options, batch=recipe.batch_size, seed=recipe.seed)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def losses(self, batch: KLBatch) -> dict[str, Tensor]:
        """Every loss is a mean: over pixels for l1 and mse, over latents for kl (to the standard normal, in nats)."""
        image, noise = batch.image.to(self.device), batch.noise.to(self.device)
        mean, logvar = (part.float() for part in self.model.moments(image))
        error = self.model.decode(mean + torch.exp(0.5 * logvar) * noise).float() - image
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return {"l1": error.abs().mean(), "mse": error.square().mean(), "kl": kl.mean()}

    def sample_image(self) -> Image.Image:
        """Eight test scenes above their reconstructions."""
        image = target_images(self.options.tasks, range(8), seed=self.seed, split="test").to(self.device)
        both = image_to_uint8(torch.cat([image, self.model.decode(self.model.encode(image))]))
        return Image.fromarray(rearrange(both, "(row column) H W C -> (row H) (column W) C", row=2))

    def save(self, folder: Path) -> None:
        """ae.safetensors and vae_config.json, with the scale and shift that make latents standard."""
        config = self.measure_scale()
        dtype = DTYPES[self.options.dtype]
        weights = {name: x.to(dtype).contiguous().cpu() for name, x in self.model.state_dict().items()}
        save_file(weights, folder / "ae.safetensors")
        (folder / "vae_config.json").write_text(json.dumps(config.to_json(), indent=1) + "\n", encoding="utf-8")

    def measure_scale(self) -> AutoencoderKLConfig:
        """The config, with scale = 1 / std and shift = mean of sampled latents of train scenes."""
        total, square, count = 0.0, 0.0, 0
        for z in self.sampled_latents():
            total, square, count = total + z.sum().item(), square + z.square().sum().item(), count + z.numel()
        mean = total / count
        return replace(self.model.config, scaling_factor=(square / count - mean**2) ** -0.5, shift_factor=mean)

    def sampled_latents(self) -> Iterator[Tensor]:
        """Unscaled latents [B, C, h, w] of train scenes, in float64."""
        generator = torch.Generator().manual_seed(self.seed)
        for first in range(0, self.options.measured_scenes, 64):
            indices = range(first, min(first + 64, self.options.measured_scenes))
            mean, logvar = self.model.moments(
                target_images(self.options.tasks, indices, seed=self.seed).to(self.device)
            )
            noise = torch.randn(mean.shape, generator=generator).to(self.device)
            yield (mean + torch.exp(0.5 * logvar) * noise).double()
