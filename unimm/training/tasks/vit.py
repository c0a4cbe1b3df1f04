"""Training a ViT on the shapes world, before a language model uses it in the place of the released SigLIP2."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.save import own_state_dict, save_safetensors
from unimm.data.shapes import COLOURS, SHAPES, SIZES, Scene, example
from unimm.data.shapes.novel_attributes import render_novel, sample_novel_attributes, sample_novel_kind
from unimm.data.shapes.world import IMAGE_SIZE
from unimm.encoders.flops import navit_flops
from unimm.encoders.siglip import SiglipConfig, SiglipNaViT, navit_config_from_json
from unimm.nn.flops import StepFlops
from unimm.nn.pos_embed import grid_position_ids
from unimm.training.config import RecipeSection, TrainConfig, from_mapping, name_source
from unimm.training.fields import Fraction, ImageTasks, NotNegative, check_world_image_size, grid_side, held_out_seed
from unimm.training.losses import LossSum
from unimm.training.throughput import StepCounts

ATTRIBUTE_NAMES = (SHAPES, COLOURS, SIZES)
# logits of the probe for each attribute: its names, and before them "nothing is centred here"
LOGIT_COUNTS = [len(names) + 1 for names in ATTRIBUTE_NAMES]
# the target of an attribute that is novel, which cross entropy leaves out
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class ViTTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # tasks of unimm.data.shapes whose target is an image, of which one is sampled for each image
    tasks: ImageTasks
    # the part of scenes whose things have novel colours, and the part whose things have novel shapes: so that a shape
    # is known whatever its colour, and a colour whatever its shape, though training holds some pairs out
    novel_colours: Fraction
    novel_shapes: Fraction
    # largest standard deviation of the noise on the pixels, which run from -1 to 1
    noise: NotNegative


@dataclass(frozen=True, kw_only=True)
class ViTBatch:
    """patches [B * n, p * p * 3], and for each the shape, colour and size of the thing centred in it [B * n, 3].

    Targets are indices into ATTRIBUTE_NAMES plus 1, 0 where no thing is centred, IGNORED for a novel attribute.
    """

    patches: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class ViTDataset:
    """Batches of train scenes, by step."""

    options: ViTTrainingConfig
    batch_size: int
    seed: int
    # of a patch's sides, in pixels
    patch: int

    def __call__(self, step: int) -> ViTBatch:
        return self.batch(self.scenes(step), random.Random(f"{self.seed}/{step}/kinds"))

    def scenes(self, step: int) -> list[Scene]:
        """The scenes of a step."""
        rng = random.Random(f"{self.seed}/{step}/look")
        tasks = self.options.tasks
        first = step * self.batch_size
        examples = [example(rng.choice(tasks), first + i, seed=self.seed) for i in range(self.batch_size)]
        return [one.target_scene for one in examples if one.target_scene is not None]

    def batch(self, scenes: Sequence[Scene], rng: random.Random | None = None) -> ViTBatch:
        """Patches of the scenes and their targets; with rng, augmented by novel attributes and noise."""
        p = self.patch
        kinds = [self.novel_kind(rng) if rng else None for _ in scenes]
        images = np.stack([self._render(scene, kind, rng) for scene, kind in zip(scenes, kinds, strict=True)])
        side = images.shape[1] // p
        targets = torch.stack([self._targets(scene, kind, side) for scene, kind in zip(scenes, kinds, strict=True)])
        pixels = torch.from_numpy(images).float() / 127.5 - 1
        if rng:
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            sigma = self.options.noise * torch.rand(len(scenes), 1, 1, 1, generator=generator)
            pixels = (pixels + sigma * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)
        patches = rearrange(pixels, "B (h p) (w q) C -> (B h w) (p q C)", p=p, q=p)
        return ViTBatch(patches=patches, targets=rearrange(targets, "B n k -> (B n) k"))

    def novel_kind(self, rng: random.Random) -> str | None:
        """The attribute that is novel in all things of a scene: "colour", "shape" or none."""
        return sample_novel_kind(rng, colours=self.options.novel_colours, shapes=self.options.novel_shapes)

    def _render(self, scene: Scene, kind: str | None, rng: random.Random | None) -> np.ndarray:
        """The image of a scene, all of whose things have a novel attribute of this kind."""
        return render_novel(scene, [sample_novel_attributes(kind, rng) if rng and kind else None for _ in scene.things])

    def _targets(self, scene: Scene, kind: str | None, side: int) -> Tensor:
        """Targets [n, 3] of an image of side * side patches."""
        targets = torch.zeros(side * side, len(ATTRIBUTE_NAMES), dtype=torch.long)
        for thing in scene.things:
            attributes = (thing.shape, thing.colour, thing.size)
            found = [1 + names.index(name) for names, name in zip(ATTRIBUTE_NAMES, attributes, strict=True)]
            if kind:
                found[{"shape": 0, "colour": 1}[kind]] = IGNORED
            targets[thing.y // self.patch * side + thing.x // self.patch] = torch.tensor(found)
        return targets


class GridProbe(nn.Module):
    """A ViT and, for training only, a linear probe of what is centred in each patch."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.vision = SiglipNaViT(config)
        self.probe = nn.Linear(config.dim, sum(LOGIT_COUNTS))

    def forward(self, patches: Tensor, side: int) -> tuple[Tensor, ...]:
        """patches [B * n, p * p * 3] of side * side an image -> logits of each attribute [B * n, names + 1]."""
        position_ids = grid_position_ids(side, side, self.config.grid_side).to(patches.device)
        n = len(patches) // side**2
        features = self.vision(patches, repeat(position_ids, "n -> (b n)", b=n), [side**2] * n)
        return self.probe(features).split(LOGIT_COUNTS, -1)


class ViTTask:
    """Predict for every patch which shape, colour and size is centred in it, if any."""

    name = "bagel-nano-vit"
    loss_names = ("shape", "colour", "size")

    def __init__(self, model: GridProbe, batch: ViTDataset, side: int):
        self.model = model
        self.batch = batch
        self.side = side

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> ViTTask:
        """Build a ViT of the recipe's `model`: a released vit_config.json's keys, and `train_image_size` in pixels."""
        options = from_mapping(ViTTrainingConfig, recipe.options, where="options")
        files = dict(recipe.model)
        config = navit_config_from_json(files)
        with name_source("train_image_size of the recipe's model"):
            check_world_image_size(files.get("train_image_size"))
        side = grid_side(config.patch_size, "patch_size")
        if side > config.grid_side:
            raise ValueError(
                f"got image_size {config.image_size} in the recipe's model, expected the side of the images to train on "
                f"or more, {IMAGE_SIZE}: there is a position for each of their patches"
            )
        torch.manual_seed(recipe.seed)
        model = GridProbe(config)
        nn.init.normal_(model.vision.pos_embed.weight, std=0.1)
        batch_size = recipe.batch_size
        dataset = ViTDataset(options=options, batch_size=batch_size, seed=recipe.seed, patch=config.patch_size)
        return cls(model, dataset, side)

    def losses(self, batch: ViTBatch) -> dict[str, LossSum]:
        """Cross entropy of each attribute."""
        device = next(self.model.parameters()).device
        logits = self.model(batch.patches.to(device), self.side)
        targets = batch.targets.to(device).unbind(-1)
        counts = self.loss_counts(batch)
        return {
            name: LossSum(F.cross_entropy(one.float(), target, reduction="sum"), counts[name])
            for name, one, target in zip(self.loss_names, logits, targets, strict=True)
            if name in counts
        }

    def loss_counts(self, batch: ViTBatch) -> dict[str, int]:
        """The number of patches whose attribute is known."""
        counts = (batch.targets != IGNORED).sum(0).tolist()
        return {name: n for name, n in zip(self.loss_names, counts, strict=True) if n}

    def step_counts(self, batch: ViTBatch) -> StepCounts:
        """Patches, images, FLOPs."""
        n_patches = len(batch.patches)
        n_images = n_patches // self.side**2
        count = StepFlops()
        features = navit_flops(count, self.model.vision, [self.side**2] * n_images)
        count.chain(n_patches, features, self.model.probe)
        return StepCounts(tokens=n_patches, images=n_images, flops=count.total)

    def accuracy(self) -> float:
        """The part of images, in a batch of train scenes that no step has, of which every patch is predicted right."""
        batch = self.batch.batch(self.batch.scenes(10**9))
        device = next(self.model.parameters()).device
        with torch.no_grad():
            logits = self.model(batch.patches.to(device), self.side)
        is_right = torch.stack([one.argmax(-1) for one in logits], -1) == batch.targets.to(device)
        return rearrange(is_right, "(b n) k -> b (n k)", n=self.side**2).all(-1).float().mean().item()

    @property
    def held_out_batch(self) -> ViTDataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image:
        """A bar as long as the accuracy: this model generates no images."""
        bar = np.arange(256)[None] < 256 * self.accuracy()
        return Image.fromarray(np.repeat(bar, 16, 0).astype(np.uint8) * 255)

    def save(self, folder: Path) -> None:
        """Write vision.safetensors under our names, and the accuracy."""
        save_safetensors(own_state_dict(self.model.vision), folder / "vision.safetensors")
        write_json(folder / "report.json", {"scenes_right": self.accuracy()}, indent=None)
