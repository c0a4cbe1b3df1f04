"""Training DC-AE on the shapes world: L1 and squared error through slightly noised latents, which are kept small."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint.component import DIFFUSERS_WEIGHT_FILES
from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.load import parse_dtype
from unimm.checkpoint.save import released_state_dict, save_safetensors
from unimm.data.shapes.scenes import held_out_scenes, reconstruction_scores, render_augmented, target_scenes
from unimm.nn.flops import StepFlops
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
from unimm.tokenizers.flops import dc_ae_decode_flops, dc_ae_encode_flops
from unimm.training.config import RecipeSection, TrainConfig, from_mapping
from unimm.training.fields import (
    AtLeastOne,
    Dtype,
    Fraction,
    ImageTasks,
    NotNegative,
    WorldImageSize,
    grid_side,
    held_out_seed,
)
from unimm.training.losses import LossSum
from unimm.training.samples import tensor_grid
from unimm.training.throughput import StepCounts


@dataclass(frozen=True, kw_only=True)
class DCAETrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # tasks of unimm.data.shapes whose target is an image, in turn
    tasks: ImageTasks
    # of the images' sides, in pixels
    image_size: WorldImageSize
    # the part of things with novel colours, and with novel shapes
    novel_colours: Fraction
    novel_shapes: Fraction
    # the part of scenes that are fuller than any task's
    crowded: Fraction
    # deviation of the noise on latents, so that those that a denoiser nearly gets right are decoded right
    latent_noise: NotNegative
    # test scenes that are scored
    scored_scenes: AtLeastOne
    # train scenes that the scale is measured on
    measured_scenes: AtLeastOne
    # of the released weights
    dtype: Dtype


@dataclass(frozen=True, kw_only=True)
class DCAEBatch:
    """image [B, 3, h, w] in [-1, 1] and the noise [B, C, h', w'] of its latents."""

    image: Tensor
    noise: Tensor


@dataclass(frozen=True, kw_only=True)
class DCAEDataset:
    """Batches of augmented train scenes, by step."""

    options: DCAETrainingConfig
    batch_size: int
    latent_shape: tuple[int, int, int]
    seed: int

    def __call__(self, step: int) -> DCAEBatch:
        options = self.options
        indices = range(step * self.batch_size, (step + 1) * self.batch_size)
        image = render_augmented(
            target_scenes(options.tasks, indices, seed=self.seed),
            Random(f"{self.seed}/{step}/dcae"),
            colours=options.novel_colours,
            shapes=options.novel_shapes,
            crowded=options.crowded,
        )
        generator = torch.Generator().manual_seed(self.seed * 2**32 + step)
        return DCAEBatch(image=image, noise=torch.randn(self.batch_size, *self.latent_shape, generator=generator))


def init_dc_ae(model: DCAE) -> DCAE:
    """Set residual branches to 0, in place, so that at the start the shortcuts alone carry the image."""
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


class DCAELossTask:
    """The half of both DC-AE tasks: the losses of images that are reconstructed through a few wide latents."""

    name = "dcae"
    # size: the mean square of latents
    loss_names = ("l1", "mse", "size")
    # its scale is 1 while it is trained: latents are measured in the end
    model: DCAE
    # deviation of the noise on latents
    latent_noise: float

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def losses(self, batch: DCAEBatch) -> dict[str, LossSum]:
        """Losses: l1 and mse over pixels, size over latents."""
        image = batch.image.to(self.device)
        z = self.model.encode(image).float()
        error = self.model.decode(z + self.latent_noise * batch.noise.to(self.device)).float() - image
        return {
            "l1": LossSum.over(error.abs()),
            "mse": LossSum.over(error.square()),
            "size": LossSum.over(z.square()),
        }

    def loss_counts(self, batch: DCAEBatch) -> dict[str, int]:
        """The numbers of pixels and of latents."""
        return {"l1": batch.image.numel(), "mse": batch.image.numel(), "size": batch.noise.numel()}

    def step_counts(self, batch: DCAEBatch) -> StepCounts:
        """Positions of the latents, images, FLOPs."""
        n_images, _, height, width = batch.image.shape
        count = StepFlops()
        latents = dc_ae_encode_flops(count, self.model, n_images, (height, width))
        dc_ae_decode_flops(count, self.model, n_images, (height, width), carries=latents)
        return StepCounts(tokens=batch.noise[:, 0].numel(), images=n_images, flops=count.total)

    def reconstruct(self, image: Tensor) -> Tensor:
        """image [B, 3, h, w] -> its reconstruction, through latents without noise."""
        return self.model.decode(self.model.encode(image.to(self.device)))

    def measure_scale(self, images: Iterable[Tensor]) -> DCAEConfig:
        """The config, with scale = 1 / the root mean square of latents of images [B, 3, h, w] in [-1, 1]; no shift."""
        total = 0.0
        count = 0
        for image in images:
            z = self.model.encoder(image.to(self.device)).double()
            total += z.square().sum().item()
            count += z.numel()
        return replace(self.model.config, scaling_factor=(total / count) ** -0.5)


class DCAETask(DCAELossTask):
    """Reconstruct images of the shapes world through a few wide latents."""

    def __init__(self, config: DCAEConfig, options: DCAETrainingConfig, *, batch_size: int, seed: int) -> None:
        self.options = options
        self.latent_noise = options.latent_noise
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = init_dc_ae(DCAE(config))
        grid = grid_side(config.stride, "a stride of")
        shape = (config.latent_channels, grid, grid)
        self.batch = DCAEDataset(options=options, batch_size=batch_size, latent_shape=shape, seed=seed)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> DCAETask:
        """Build a model of the recipe's `model`: a released config.json's keys but the scale, which is measured."""
        options = from_mapping(DCAETrainingConfig, recipe.options, where="options of the recipe")
        config = DCAEConfig.from_json({**recipe.model, "scaling_factor": 1.0})
        return cls(config, options, batch_size=recipe.batch_size, seed=recipe.seed)

    @property
    def held_out_batch(self) -> DCAEDataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image:
        """Rows of eight: test scenes, their reconstructions, augmented train scenes, theirs."""
        plain = held_out_scenes(self.options.tasks, 8, self.seed)[1]
        augmented = replace(self.batch, batch_size=8)(0).image
        rows = [part for image in (plain, augmented) for part in (image, self.reconstruct(image).cpu())]
        return tensor_grid(torch.cat(rows), columns=8)

    def save(self, folder: Path) -> None:
        """Write the released layout, with the scale that standardises latents of train scenes, and scores of test
        scenes."""
        n_batches = -(-self.options.measured_scenes // self.batch.batch_size)
        config = self.measure_scale(self.batch(number).image for number in range(n_batches))
        save_dc_ae(self.model, config, folder, parse_dtype(self.options.dtype))
        scenes, image = held_out_scenes(self.options.tasks, self.options.scored_scenes, self.seed)
        report = reconstruction_scores(self.reconstruct, scenes, image)
        write_json(folder / "report.json", report, indent=None)


def save_dc_ae(model: DCAE, config: DCAEConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write weights and a config in the released layout."""
    weights = released_state_dict(model, dc_ae_key_map(config))
    save_safetensors({name: x.to(dtype) for name, x in weights.items()}, folder / DIFFUSERS_WEIGHT_FILES[0])
    write_json(folder / "config.json", config.to_json())
