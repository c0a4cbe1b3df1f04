"""What training an autoencoder of the little world needs: scenes with strange things in them, and how many come back right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimm.data.batching import image_to_uint8, uint8_to_image
from unimm.data.shapes import SIZES, Scene, Thing, example, parse_scene, place_of
from unimm.data.shapes.novel_attributes import render_novel, sample_novel_attributes, sample_novel_kind
from unimm.data.shapes.world import TRAIN_PAIRS

SCORING_BATCH = 50


def target_scenes(tasks: tuple[str, ...], indices: range, *, seed: int, split: str = "train") -> list[Scene]:
    """Scenes number `indices` of the tasks in turn."""
    examples = [example(tasks[i % len(tasks)], i // len(tasks), seed=seed, split=split) for i in indices]
    return [one.target_scene for one in examples if one.target_scene is not None]


def render_augmented(scenes: Sequence[Scene], rng: Random, *, colours: float, shapes: float, crowded: float) -> Tensor:
    """Pictures [n, 3, H, W] in [-1, 1] of scenes: so many made full, so many things of a colour or a shape of no name."""
    scenes = [crowded_scene(rng) if rng.random() < crowded else scene for scene in scenes]
    images = []
    for scene in scenes:
        kinds = (sample_novel_kind(rng, colours=colours, shapes=shapes) for _ in scene.things)
        images.append(render_novel(scene, [sample_novel_attributes(kind, rng) if kind else None for kind in kinds]))
    return uint8_to_image(np.stack(images))


def crowded_scene(rng: Random) -> Scene:
    """Five to nine things of pairs that are not held out."""
    things = []
    for cell in rng.sample(range(9), rng.randint(5, 9)):
        shape, colour = rng.choice(TRAIN_PAIRS)
        dx, dy = rng.randint(-1, 1), rng.randint(-1, 1)
        things.append(Thing(shape=shape, colour=colour, size=rng.choice(SIZES), cell=cell, dx=dx, dy=dy))
    return Scene(things=tuple(things))


def test_scenes(tasks: tuple[str, ...], n: int, seed: int) -> tuple[list[Scene], Tensor]:
    """n test scenes and their pictures [n, 3, H, W] in [-1, 1]."""
    found = target_scenes(tasks, range(n), seed=seed, split="test")
    return found, uint8_to_image(np.stack([render_novel(scene, [None] * len(scene.things)) for scene in found]))


def reconstruction_scores(
    reconstruct: Callable[[Tensor], Tensor], scenes: Sequence[Scene], image: Tensor
) -> dict[str, float]:
    """The part of scenes that is read fully right from what comes of their pictures [n, 3, H, W], and decibels."""
    right, square = 0, 0.0
    for first in range(0, len(scenes), SCORING_BATCH):
        part, scenes_of_part = image[first : first + SCORING_BATCH], scenes[first : first + SCORING_BATCH]
        drawn = reconstruct(part).cpu().float()
        square += (drawn.clamp(-1, 1) - part).square().sum().item()
        right += sum(
            parses_as(pixels, scene) for pixels, scene in zip(image_to_uint8(drawn), scenes_of_part, strict=True)
        )
    psnr = -10 * float(np.log10(square / image.numel() / 4))
    return {"scenes": len(scenes), "scenes_right": right / len(scenes), "psnr": psnr}


def parses_as(pixels: NDArray[np.uint8], scene: Scene) -> bool:
    """Whether exactly the scene's things are read from the picture: shape, colour, size and cell."""
    seen = sorted((one.shape, one.colour, one.size, place_of(one.x, one.y)) for one in parse_scene(pixels))
    return seen == sorted((one.shape, one.colour, one.size, one.place) for one in scene.things)
