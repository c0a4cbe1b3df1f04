"""Training DC-AE on the little world: L1 and squared error through slightly noised latents, which are held small."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint.component import DIFFUSERS_WEIGHT_FILES
from unimm.checkpoint.save import released_state_dict, save_safetensors
from unimm.data.batching import image_to_uint8
from unimm.data.shapes.scenes import reconstruction_scores, render_augmented, target_scenes, test_scenes
from unimm.tokenizers.dc_ae import (
    DCAE,
    DCAEConfig,
    DCAEDownsample,
    DCAEResBlock,
    DCAEUpsample,
    EfficientViTBlock,
    MultiscaleLinearAttention,
    dc_ae_key_map,
)
from unimm.training.config import TrainConfig, strict
from unimm.training.tasks.kl_vae import DTYPES


@dataclass(frozen=True, kw_only=True)
class DCAETrainingConfig:
    """What the recipe's `options` may say."""

    # tasks of unimm.data.shapes that end in a picture, in turn
    tasks: tuple[str, ...]
    image_size: int
    # the part of things in colours of no name, and of shapes of no name
    novel_colours: float
    novel_shapes: float
    # the part of pictures that are fuller than any task's
    crowded: float
    # deviation of what is added to latents, so that those a painter nearly gets right are drawn right
    latent_noise: float
    # test scenes that the report is about; train scenes that the scale is measured over
    scored_scenes: int
    measured_scenes: int
    # type of the released weights
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"got dtype {self.dtype!r}, expected one of {list(DTYPES)}: correct the recipe's options")


@dataclass(frozen=True, kw_only=True)
class DCAEBatch:
    """image [B, 3, H, W] in [-1, 1] and the noise [B, C, h, w] of its latents."""

    image: Tensor
    noise: Tensor


@dataclass(frozen=True, kw_only=True)
class DCAEDataset:
    """Batches of train scenes, some of whose things have no name, by step."""

    options: DCAETrainingConfig
    batch_size: int
    latent_shape: tuple[int, int, int]
    seed: int

    def __call__(self, step: int) -> DCAEBatch:
        rng, part = Random(f"{self.seed}/{step}/dcae"), self.options
        chosen = target_scenes(part.tasks, range(step * self.batch_size, (step + 1) * self.batch_size), seed=self.seed)
        image = render_augmented(
            chosen, rng, colours=part.novel_colours, shapes=part.novel_shapes, crowded=part.crowded
        )
        generator = torch.Generator().manual_seed(self.seed * 2**32 + step)
        return DCAEBatch(image=image, noise=torch.randn(self.batch_size, *self.latent_shape, generator=generator))


def init_dc_ae(model: DCAE) -> DCAE:
    """What training starts from: blocks that add nothing yet, so that the shortcuts alone carry the picture."""
    for module in model.modules():
        if isinstance(module, DCAEResBlock):
            nn.init.zeros_(module.norm.weight)
        elif isinstance(module, MultiscaleLinearAttention):
            nn.init.zeros_(module.norm_out.weight)
        elif isinstance(module, EfficientViTBlock):
            nn.init.zeros_(module.conv_norm.weight)
        elif isinstance(module, DCAEDownsample | DCAEUpsample):
            bias = module.conv.bias
            assert bias is not None, "both have one"
            nn.init.zeros_(bias)
    return model


class DCAETask:
    """Reconstruct through a few wide latents."""

    name = "dcae"
    loss_names = ("l1", "mse", "size")

    def __init__(self, config: DCAEConfig, options: DCAETrainingConfig, *, batch: int, seed: int) -> None:
        self.options, self.seed = options, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = init_dc_ae(DCAE(config))
        grid = options.image_size // config.stride
        self.batch = DCAEDataset(
            options=options, batch_size=batch, latent_shape=(config.latent_channels, grid, grid), seed=seed
        )

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> DCAETask:
        """A fresh model of the recipe's config: the keys of a released config.json, but for the scale, which is measured."""
        options = strict(DCAETrainingConfig, recipe.options, where="options of the recipe")
        config = DCAEConfig.from_json({**recipe.model, "scaling_factor": 1.0})
        return cls(config, options, batch=recipe.batch_size, seed=recipe.seed)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def losses(self, batch: DCAEBatch) -> dict[str, Tensor]:
        """Every loss is a mean: over pixels for l1 and mse; size is the mean square of latents."""
        image = batch.image.to(self.device)
        z = self.model.encode(image).float()
        error = self.model.decode(z + self.options.latent_noise * batch.noise.to(self.device)).float() - image
        return {"l1": error.abs().mean(), "mse": error.square().mean(), "size": z.square().mean()}

    def reconstruct(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> what comes of it, through latents without noise."""
        return self.model.decode(self.model.encode(image.to(self.device)))

    def sample_image(self) -> Image.Image:
        """Rows of eight: test scenes, what comes of them, train scenes with nameless things, what comes of them."""
        plain, odd = test_scenes(self.options.tasks, 8, self.seed)[1], replace(self.batch, batch_size=8)(0).image
        rows = torch.cat([part for image in (plain, odd) for part in (image, self.reconstruct(image).cpu())])
        return Image.fromarray(rearrange(image_to_uint8(rows), "(row column) H W C -> (row H) (column W) C", column=8))

    def save(self, folder: Path) -> None:
        """The released layout, with the scale that makes latents standard, and a report of what became of test scenes."""
        config = self.measure_scale()
        weights = released_state_dict(self.model, dc_ae_key_map(config))
        save_safetensors(
            {name: x.to(DTYPES[self.options.dtype]) for name, x in weights.items()}, folder / DIFFUSERS_WEIGHT_FILES[0]
        )
        (folder / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n", encoding="utf-8")
        report = reconstruction_scores(
            self.reconstruct, *test_scenes(self.options.tasks, self.options.scored_scenes, self.seed)
        )
        (folder / "report.json").write_text(json.dumps(report) + "\n", encoding="utf-8")

    def measure_scale(self) -> DCAEConfig:
        """The config, with scale = 1 / the root mean square of latents of train scenes: there is no shift."""
        total, count = 0.0, 0
        for step in range(-(-self.options.measured_scenes // self.batch.batch_size)):
            z = self.model.encoder(self.batch(step).image.to(self.device)).double()
            total, count = total + z.square().sum().item(), count + z.numel()
        return replace(self.model.config, scaling_factor=(total / count) ** -0.5)
