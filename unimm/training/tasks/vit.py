"""Training a ViT to see the little world, before a language model reads it: what SigLIP2 is to the released BAGEL."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from unimm.data.shapes import COLOURS, SHAPES, SIZES, Scene, example
from unimm.data.shapes.novel_attributes import render_novel, sample_novel_attributes, sample_novel_kind
from unimm.encoders.siglip import SiglipConfig, SiglipNaViT, navit_config_from_json
from unimm.nn.patches import grid_position_ids
from unimm.training.config import TrainConfig, strict

ATTRIBUTE_NAMES = (SHAPES, COLOURS, SIZES)
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class ViTTrainingConfig:
    """What the recipe's `options` may say."""

    # tasks of unimm.data.shapes that end in a picture, in turn
    tasks: tuple[str, ...]
    # the part of scenes whose things have colours of no name, and the part whose things have shapes of no name: so that
    # a shape is known whatever its colour, and a colour whatever its shape, though some pairs are never shown
    novel_colours: float
    novel_shapes: float
    # largest standard deviation of the noise on the pixels, which run from -1 to 1
    noise: float


@dataclass(frozen=True, kw_only=True)
class ViTBatch:
    """patches [B * n, p * p * 3] and, for each patch, the shape, colour and size whose centre it holds [B * n, 3]."""

    patches: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class ViTDataset:
    """Batches of train scenes, by step."""

    options: ViTTrainingConfig
    batch_size: int
    seed: int
    patch: int

    def __call__(self, step: int) -> ViTBatch:
        return self.batch(self.scenes(step), random.Random(f"{self.seed}/{step}/kinds"))

    def scenes(self, step: int) -> list[Scene]:
        """The scenes of a step."""
        rng = random.Random(f"{self.seed}/{step}/look")
        tasks = self.options.tasks
        examples = [
            example(rng.choice(tasks), step * self.batch_size + i, seed=self.seed) for i in range(self.batch_size)
        ]
        return [one.target_scene for one in examples if one.target_scene is not None]

    def batch(self, scenes: Sequence[Scene], rng: random.Random | None = None) -> ViTBatch:
        """Scenes, and what is centred in each of their patches; with dice, some of them nameless, all of them noisy."""
        p = self.patch
        kinds = [self.novel_kind(rng) if rng else None for _ in scenes]
        images = np.stack(
            [
                render_novel(
                    scene, [sample_novel_attributes(kind, rng) if rng and kind else None for _ in scene.things]
                )
                for scene, kind in zip(scenes, kinds, strict=True)
            ]
        )
        side = images.shape[1] // p
        targets = torch.zeros(len(scenes), side * side, len(ATTRIBUTE_NAMES), dtype=torch.long)
        for i, (scene, kind) in enumerate(zip(scenes, kinds, strict=True)):
            for thing in scene.things:
                names = (thing.shape, thing.colour, thing.size)
                found = torch.tensor(
                    [1 + known.index(name) for known, name in zip(ATTRIBUTE_NAMES, names, strict=True)]
                )
                if kind:
                    found[{"shape": 0, "colour": 1}[kind]] = IGNORED
                targets[i, thing.y // p * side + thing.x // p] = found
        pixels = torch.from_numpy(images).float() / 127.5 - 1
        if rng:
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            sigma = self.options.noise * torch.rand(len(scenes), 1, 1, 1, generator=generator)
            pixels = (pixels + sigma * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)
        patches = rearrange(pixels, "b (h p) (w q) c -> (b h w) (p q c)", p=p, q=p)
        return ViTBatch(patches=patches, targets=rearrange(targets, "b n k -> (b n) k"))

    def novel_kind(self, rng: random.Random) -> str | None:
        """What of a scene shall have no name: its things' "colour", their "shape", or nothing."""
        return sample_novel_kind(rng, colours=self.options.novel_colours, shapes=self.options.novel_shapes)


class GridProbe(nn.Module):
    """A ViT and, for training only, a linear guess of what is centred in each patch."""

    def __init__(self, cfg: SiglipConfig):
        super().__init__()
        self.vision = SiglipNaViT(cfg)
        self.probe = nn.Linear(cfg.dim, sum(len(kind) + 1 for kind in ATTRIBUTE_NAMES))
        self.config = cfg

    def forward(self, patches: Tensor, side: int) -> tuple[Tensor, ...]:
        """patches [B * n, p*p*3] of square pictures of side * side patches -> for each kind the logits [B * n, names + 1]."""
        where, n = grid_position_ids(side, side, self.config.grid_side).to(patches.device), len(patches) // side**2
        seen = self.vision(patches, repeat(where, "n -> (b n)", b=n), [side**2] * n)
        return self.probe(seen).split([len(kind) + 1 for kind in ATTRIBUTE_NAMES], -1)


class ViTTask:
    """Say of every patch which shape, colour and size is centred in it, if any."""

    name = "bagel-nano-vit"
    loss_names = ("shape", "colour", "size")

    def __init__(self, model: GridProbe, batch: ViTDataset, side: int):
        self.model, self.batch, self.side = model, batch, side

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> ViTTask:
        """A fresh ViT of the recipe's config: the keys of a released vit_config.json, and `picture`, pixels a side."""
        options, files = strict(ViTTrainingConfig, recipe.options, where="options"), dict(recipe.model)
        torch.manual_seed(recipe.seed)
        model = GridProbe(navit_config_from_json(files))
        nn.init.normal_(model.vision.pos_embed.weight, std=0.1)
        scenes = ViTDataset(options=options, batch_size=recipe.batch_size, seed=recipe.seed, patch=files["patch_size"])
        return cls(model, scenes, files["train_image_size"] // files["patch_size"])

    def losses(self, batch: ViTBatch) -> dict[str, Tensor]:
        """Mean cross entropy of each kind."""
        device = next(self.model.parameters()).device
        logits, targets = self.model(batch.patches.to(device), self.side), batch.targets.to(device)
        losses = [F.cross_entropy(one.float(), target) for one, target in zip(logits, targets.unbind(-1), strict=True)]
        return dict(zip(self.loss_names, losses, strict=True))

    def accuracy(self) -> float:
        """The part of one batch of fresh train scenes of which every patch is said right."""
        batch = self.batch.batch(self.batch.scenes(10**9))
        device = next(self.model.parameters()).device
        with torch.no_grad():
            logits = self.model(batch.patches.to(device), self.side)
        right = torch.stack([one.argmax(-1) for one in logits], -1) == batch.targets.to(device)
        return rearrange(right, "(b n) k -> b (n k)", n=self.side**2).all(-1).float().mean().item()

    def sample_image(self) -> Image.Image:
        """A bar as long as the accuracy: this model draws nothing."""
        return Image.fromarray(np.repeat(np.arange(256)[None] < 256 * self.accuracy(), 16, 0).astype(np.uint8) * 255)

    def save(self, folder: Path) -> None:
        """vision.safetensors under our names, and the accuracy."""
        state = {name: weight.detach().clone() for name, weight in self.model.vision.state_dict().items()}
        save_file(state, folder / "vision.safetensors")
        report: Mapping[str, Any] = {"scenes_right": self.accuracy()}
        (folder / "report.json").write_text(json.dumps(report) + "\n")
