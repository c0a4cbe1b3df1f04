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

from unimm.checkpoint.save import released_state, save_state
from unimm.data.batching import to_pixels
from unimm.data.shapes.scenes import returned, scenes, strange, unseen
from unimm.tokenizers.dc_ae import DCAE, Attention, DCAEConfig, Down, ResBlock, Up, ViTBlock, keys
from unimm.tokenizers.kl_layouts import DIFFUSERS_WEIGHTS
from unimm.training.config import Recipe, strict
from unimm.training.tasks.kl_vae import DTYPES


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the recipe's `options` may say."""

    # tasks of unimm.data.shapes that end in a picture, in turn
    tasks: tuple[str, ...]
    side: int
    # the part of things in colours of no name, and of shapes of no name
    nameless_colours: float
    nameless_shapes: float
    # the part of pictures that are fuller than any task's
    crowded: float
    # deviation of what is added to latents, so that those a painter nearly gets right are drawn right
    noise: float
    # test scenes that the report is about; train scenes that the scale is measured over
    judged: int
    measured: int
    # type of the released weights
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"got dtype {self.dtype!r}, expected one of {list(DTYPES)}: correct the recipe's options")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """image [B, 3, H, W] in [-1, 1] and the noise [B, C, h, w] of its latents."""

    image: Tensor
    noise: Tensor


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Batches of train scenes, some of whose things have no name, by step."""

    options: Options
    size: int
    latent_shape: tuple[int, int, int]
    seed: int

    def __call__(self, step: int) -> Batch:
        dice, part = Random(f"{self.seed}/{step}/dcae"), self.options
        chosen = scenes(part.tasks, range(step * self.size, (step + 1) * self.size), seed=self.seed)
        image = strange(chosen, dice, colours=part.nameless_colours, shapes=part.nameless_shapes, crowded=part.crowded)
        generator = torch.Generator().manual_seed(self.seed * 2**32 + step)
        return Batch(image=image, noise=torch.randn(self.size, *self.latent_shape, generator=generator))


def begin(model: DCAE) -> DCAE:
    """What training starts from: blocks that add nothing yet, so that the shortcuts alone carry the picture."""
    for module in model.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.norm.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.norm_out.weight)
        elif isinstance(module, ViTBlock):
            nn.init.zeros_(module.conv_norm.weight)
        elif isinstance(module, Down | Up):
            bias = module.conv.bias
            assert bias is not None, "both have one"
            nn.init.zeros_(bias)
    return model


class DCAEObjective:
    """Reconstruct through a few wide latents."""

    name = "dcae"
    loss_names = ("l1", "mse", "size")

    def __init__(self, config: DCAEConfig, options: Options, *, batch: int, seed: int) -> None:
        self.options, self.seed = options, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = begin(DCAE(config))
        grid = options.side // config.stride
        self.batch = Pictures(options=options, size=batch, latent_shape=(config.latent_channels, grid, grid), seed=seed)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> DCAEObjective:
        """A fresh model of the recipe's config: the keys of a released config.json, but for the scale, which is measured."""
        options = strict(Options, recipe.options, where="options of the recipe")
        config = DCAEConfig.from_files({**recipe.model, "scaling_factor": 1.0})
        return cls(config, options, batch=recipe.batch, seed=recipe.seed)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Every loss is a mean: over pixels for l1 and mse; size is the mean square of latents."""
        image = batch.image.to(self.device)
        z = self.model.encode(image).float()
        error = self.model.decode(z + self.options.noise * batch.noise.to(self.device)).float() - image
        return {"l1": error.abs().mean(), "mse": error.square().mean(), "size": z.square().mean()}

    def redrawn(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> what comes of it, through latents without noise."""
        return self.model.decode(self.model.encode(image.to(self.device)))

    def picture(self) -> Image.Image:
        """Rows of eight: test scenes, what comes of them, train scenes with nameless things, what comes of them."""
        plain, odd = unseen(self.options.tasks, 8, self.seed)[1], replace(self.batch, size=8)(0).image
        rows = torch.cat([part for image in (plain, odd) for part in (image, self.redrawn(image).cpu())])
        return Image.fromarray(rearrange(to_pixels(rows), "(row column) H W C -> (row H) (column W) C", column=8))

    def save(self, folder: Path) -> None:
        """The released layout, with the scale that makes latents standard, and a report of what became of test scenes."""
        config = self.measured()
        weights = released_state(self.model, keys(config))
        save_state(
            {name: x.to(DTYPES[self.options.dtype]) for name, x in weights.items()}, folder / DIFFUSERS_WEIGHTS[0]
        )
        (folder / "config.json").write_text(json.dumps(config.to_files(), indent=2) + "\n", encoding="utf-8")
        report = returned(self.redrawn, *unseen(self.options.tasks, self.options.judged, self.seed))
        (folder / "report.json").write_text(json.dumps(report) + "\n", encoding="utf-8")

    def measured(self) -> DCAEConfig:
        """The config, with scale = 1 / the root mean square of latents of train scenes: there is no shift."""
        total, count = 0.0, 0
        for step in range(-(-self.options.measured // self.batch.size)):
            z = self.model.encoder(self.batch(step).image.to(self.device)).double()
            total, count = total + z.square().sum().item(), count + z.numel()
        return replace(self.model.config, scale=(total / count) ** -0.5)
