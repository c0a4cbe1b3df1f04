"""Scenes to train autoencoders on, with novel attributes and crowds, and scores of their reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimm.data.batching import image_to_uint8, uint8_to_image
from unimm.data.shapes import SIZES, Scene, Thing, example, parse_scene, place_of, render
from unimm.data.shapes.novel_attributes import render_novel, sample_novel_attributes, sample_novel_kind
from unimm.data.shapes.world import TRAIN_PAIRS

# images reconstructed at a time
SCORING_BATCH = 50


def target_scenes(tasks: tuple[str, ...], indices: range, *, seed: int, split: str = "train") -> list[Scene]:
    """The target scenes of examples number `indices`, of the tasks in turn."""
    examples = [example(tasks[i % len(tasks)], i // len(tasks), seed=seed, split=split) for i in indices]
    return [one.target_scene for one in examples if one.target_scene is not None]


def render_augmented(scenes: Sequence[Scene], rng: Random, *, colours: float, shapes: float, crowded: float) -> Tensor:
    """Images [n, 3, h, w] in [-1, 1] of the scenes, augmented.

    crowded: the part of scenes that is replaced by a crowded one; colours, shapes: the part of things that get a novel
    colour, or a novel shape.
    """
    scenes = [crowded_scene(rng) if rng.random() < crowded else scene for scene in scenes]
    images = []
    for scene in scenes:
        # a generator: a thing's attributes are sampled right after its kind
        kinds = (sample_novel_kind(rng, colours=colours, shapes=shapes) for _ in scene.things)
        images.append(render_novel(scene, [sample_novel_attributes(kind, rng) if kind else None for kind in kinds]))
    return uint8_to_image(np.stack(images))


def crowded_scene(rng: Random) -> Scene:
    """A scene of five to nine things of pairs that are not held out, more than any task has."""
    things = []
    for cell in rng.sample(range(9), rng.randint(5, 9)):
        shape, colour = rng.choice(TRAIN_PAIRS)
        dx = rng.randint(-1, 1)
        dy = rng.randint(-1, 1)
        things.append(Thing(shape=shape, colour=colour, size=rng.choice(SIZES), cell=cell, dx=dx, dy=dy))
    return Scene(things=tuple(things))


def held_out_scenes(tasks: tuple[str, ...], n: int, seed: int) -> tuple[list[Scene], Tensor]:
    """n scenes of the test split and their images [n, 3, h, w] in [-1, 1]."""
    scenes = target_scenes(tasks, range(n), seed=seed, split="test")
    return scenes, uint8_to_image(np.stack([render(scene) for scene in scenes]))


def reconstruction_scores(
    reconstruct: Callable[[Tensor], Tensor], scenes: Sequence[Scene], image: Tensor
) -> dict[str, float]:
    """The part of scenes that is parsed fully right from reconstructions of their images [n, 3, h, w], and the PSNR."""
    n_right = 0
    squared_error = 0.0
    for first in range(0, len(scenes), SCORING_BATCH):
        part = image[first : first + SCORING_BATCH]
        reconstruction = reconstruct(part).cpu().float()
        squared_error += (reconstruction.clamp(-1, 1) - part).square().sum().item()
        pairs = zip(image_to_uint8(reconstruction), scenes[first : first + SCORING_BATCH], strict=True)
        n_right += sum(parses_as(pixels, scene) for pixels, scene in pairs)
    # the range of values is 2, whose square is 4
    psnr = -10 * float(np.log10(squared_error / image.numel() / 4))
    return {"scenes": len(scenes), "scenes_right": n_right / len(scenes), "psnr": psnr}


def parses_as(pixels: NDArray[np.uint8], scene: Scene) -> bool:
    """Whether exactly the scene's things are parsed from the image: shape, colour, size and cell."""
    found = sorted((one.shape, one.colour, one.size, place_of(one.x, one.y)) for one in parse_scene(pixels))
    return found == sorted((one.shape, one.colour, one.size, one.place) for one in scene.things)
