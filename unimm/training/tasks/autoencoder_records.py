"""Training the parts that learn from images alone on one's own records: a VQ tokenizer, a KL autoencoder, a DC-AE.

The losses are those of the shapes world's tasks: L1 and squared error, no perceptual and no adversarial one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.load import parse_dtype
from unimm.models.janus.model import Janus
from unimm.tokenizers.dc_ae import DCAE, DCAEConfig
from unimm.tokenizers.kl import AutoencoderKL
from unimm.tokenizers.vq import VQModel
from unimm.training.config import TrainConfig, from_mapping
from unimm.training.fields import Dtype, NoneOrMore, NotNegative
from unimm.training.freezing import freeze
from unimm.training.init import resolve_part
from unimm.training.pretrained import ReleaseConfig, load_released
from unimm.training.samples import tensor_grid
from unimm.training.tasks.dc_ae import DCAEBatch, DCAELossTask, init_dc_ae, save_dc_ae
from unimm.training.tasks.image_samples import (
    ImageCropConfig,
    ImageSample,
    ImageSampleBuilder,
    data_images,
    latent_noise,
    reconstruction_rows,
)
from unimm.training.tasks.kl_vae import KLArchitecture, KLBatch, KLLossTask, save_kl
from unimm.training.tasks.vq import (
    VQArchitecture,
    VQBatch,
    VQCommonConfig,
    VQLossTask,
    reconstruct,
    save_vq,
    starting_vq,
)

# columns of sample images: images of the data above their reconstructions
SAMPLED_IMAGES = 8

# ---- VQ tokenizer


@dataclass(frozen=True, kw_only=True)
class VQRecordConfig(VQCommonConfig, ImageCropConfig):
    """The recipe's `options` where it has `data`."""

    def __post_init__(self) -> None:
        VQCommonConfig.__post_init__(self)
        ImageCropConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class VQSampleBuilder(ImageSampleBuilder):
    """Batches for a VQ tokenizer."""

    def collate(self, samples: Sequence[ImageSample], rng: random.Random) -> VQBatch:
        """Crops as a batch."""
        return VQBatch(image=self.images(samples))


class VQRecordTask(VQLossTask):
    """Reconstruct images of records through a codebook."""

    def __init__(self, model: VQModel, options: VQRecordConfig, recipe: TrainConfig) -> None:
        super().__init__(model, options, recipe)
        self.recipe = recipe
        self.sample_builder = VQSampleBuilder(crop=options, stride=model.config.stride)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> VQRecordTask:
        """Build a model of the recipe's numbers, or take that of a Janus, or start from a trained one."""
        options = from_mapping(VQRecordConfig, recipe.options, where="options of the recipe")
        if "from_pretrained" not in recipe.model:
            config = from_mapping(VQArchitecture, recipe.model, where="model of the recipe").config()
            return cls(starting_vq(config, options, recipe.seed), options, recipe)
        if options.init_from is not None:
            raise ValueError("got model.from_pretrained and init_from: expected one of both")
        vq = load_released(Janus, recipe.model).vq
        freeze(vq, options.frozen)
        return cls(vq, options, recipe)

    def sample_image(self) -> Image.Image:
        """Images of the data above their reconstructions."""
        (image,) = data_images(self.sample_builder, self.recipe, SAMPLED_IMAGES)
        reconstruction = reconstruct(self.model, image.to(next(self.model.parameters()).device))[1]
        return tensor_grid(reconstruction_rows(image, reconstruction), columns=SAMPLED_IMAGES)

    def save(self, folder: Path) -> None:
        """Write vq.safetensors and vq_config.json, and how many codes were used lately."""
        save_vq(self.model, folder, parse_dtype(self.options.dtype))
        used = self.model.quantize.codebook_used
        report = {"codes": self.model.config.n_codes, "codes_used": len(used[used >= 0].unique())}
        write_json(folder / "report.json", report, indent=None)


# ---- KL autoencoder


@dataclass(frozen=True, kw_only=True)
class KLRecordConfig(ImageCropConfig):
    """The recipe's `options` where it has `data`."""

    # images that scale and shift of latents are measured on; 0 to keep those of the release that training starts from
    measured_images: NoneOrMore
    # of the released weights
    dtype: Dtype
    # prefixes of the names of parameters that are not trained
    frozen: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class KLSampleBuilder(ImageSampleBuilder):
    """Batches for a KL autoencoder."""

    latent_channels: int

    def collate(self, samples: Sequence[ImageSample], rng: random.Random) -> KLBatch:
        """Crops as a batch, with the noise of the posterior."""
        shape = (self.latent_channels, self.grid, self.grid)
        return KLBatch(image=self.images(samples), noise=latent_noise(len(samples), shape, rng))


class KLRecordTask(KLLossTask):
    """Reconstruct images of records through a sample of the posterior."""

    def __init__(self, model: AutoencoderKL, options: KLRecordConfig, recipe: TrainConfig) -> None:
        self.released_config = model.config
        # latents are trained as they are, and measured in the end
        model.config = replace(model.config, scaling_factor=1.0, shift_factor=0.0)
        freeze(model, options.frozen)
        self.model = model
        self.options = options
        self.recipe = recipe
        self.seed = recipe.seed
        self.sample_builder = KLSampleBuilder(
            crop=options, stride=model.config.stride, latent_channels=model.config.latent_channels
        )

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> KLRecordTask:
        """Build a model of the recipe's numbers, or start from a released one: a folder, or a hub id, perhaps of a model
        that has it as its part `vae`."""
        options = from_mapping(KLRecordConfig, recipe.options, where="options of the recipe")
        if place := released_part(recipe, options.measured_images):
            return cls(AutoencoderKL.from_pretrained(place), options, recipe)
        config = from_mapping(KLArchitecture, recipe.model, where="model of the recipe").config()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return cls(AutoencoderKL(config), options, recipe)

    def sample_image(self) -> Image.Image:
        """Images of the data above their reconstructions."""
        (image,) = data_images(self.sample_builder, self.recipe, SAMPLED_IMAGES)
        reconstruction = self.model.decode(self.model.encode(image.to(self.device)))
        return tensor_grid(reconstruction_rows(image, reconstruction), columns=SAMPLED_IMAGES)

    def save(self, folder: Path) -> None:
        """Write ae.safetensors and vae_config.json, with the scale and shift that standardise latents of the data."""
        config = self.released_config
        if n := self.options.measured_images:
            config = self.measure_scale(data_images(self.sample_builder, self.recipe, n))
        save_kl(self.model, config, folder, parse_dtype(self.options.dtype))


# ---- DC-AE


@dataclass(frozen=True, kw_only=True)
class DCAERecordConfig(KLRecordConfig):
    """The recipe's `options` where it has `data`."""

    # deviation of the noise on latents, so that those that a denoiser nearly gets right are decoded right
    latent_noise: NotNegative


@dataclass(frozen=True, kw_only=True)
class DCAESampleBuilder(ImageSampleBuilder):
    """Batches for a DC-AE."""

    latent_channels: int

    def collate(self, samples: Sequence[ImageSample], rng: random.Random) -> DCAEBatch:
        """Crops as a batch, with noise for their latents."""
        shape = (self.latent_channels, self.grid, self.grid)
        return DCAEBatch(image=self.images(samples), noise=latent_noise(len(samples), shape, rng))


class DCAERecordTask(DCAELossTask):
    """Reconstruct images of records through a few wide latents."""

    def __init__(self, model: DCAE, options: DCAERecordConfig, recipe: TrainConfig) -> None:
        self.released_config = model.config
        model.config = replace(model.config, scaling_factor=1.0)
        freeze(model, options.frozen)
        self.model = model
        self.options = options
        self.latent_noise = options.latent_noise
        self.recipe = recipe
        self.sample_builder = DCAESampleBuilder(
            crop=options, stride=model.config.stride, latent_channels=model.config.latent_channels
        )

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> DCAERecordTask:
        """Build a model of the recipe's `model`, a released config.json's keys but the scale, or start from a release."""
        options = from_mapping(DCAERecordConfig, recipe.options, where="options of the recipe")
        if place := released_part(recipe, options.measured_images):
            return cls(DCAE.from_pretrained(place), options, recipe)
        config = DCAEConfig.from_json({**recipe.model, "scaling_factor": 1.0})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return cls(init_dc_ae(DCAE(config)), options, recipe)

    def sample_image(self) -> Image.Image:
        """Images of the data above their reconstructions."""
        (image,) = data_images(self.sample_builder, self.recipe, SAMPLED_IMAGES)
        return tensor_grid(reconstruction_rows(image, self.reconstruct(image)), columns=SAMPLED_IMAGES)

    def save(self, folder: Path) -> None:
        """Write the released layout, with the scale that standardises latents of the data."""
        config = self.released_config
        if n := self.options.measured_images:
            config = self.measure_scale(data_images(self.sample_builder, self.recipe, n))
        save_dc_ae(self.model, config, folder, parse_dtype(self.options.dtype))


def released_part(recipe: TrainConfig, measured_images: int) -> Path | None:
    """The folder of the autoencoder that a recipe's `model` names; None where `model` has its numbers instead.

    Raises ValueError for numbers without images to measure the latents of.
    """
    if "from_pretrained" in recipe.model:
        return resolve_part(
            from_mapping(ReleaseConfig, recipe.model, where="model of the recipe").from_pretrained, "vae"
        )
    if not measured_images:
        raise ValueError(
            "got measured_images 0, and an autoencoder from scratch, whose latents have no scale yet: expected some"
        )
    return None
