"""What training an autoencoder of the little world needs: scenes with strange things in them, and how many come back right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unimm.data.batching import to_image, to_pixels
from unimm.data.shapes import SIZES, Scene, Thing, example, place_of, read
from unimm.data.shapes.novel_attributes import kind_of, new_look, painted
from unimm.data.shapes.world import TRAIN_PAIRS

JUDGED_AT_ONCE = 50


def scenes(tasks: tuple[str, ...], indices: range, *, seed: int, split: str = "train") -> list[Scene]:
    """Scenes number `indices` of the tasks in turn."""
    examples = [example(tasks[i % len(tasks)], i // len(tasks), seed=seed, split=split) for i in indices]
    return [one.after for one in examples if one.after is not None]


def strange(chosen: Sequence[Scene], dice: Random, *, colours: float, shapes: float, crowded: float) -> Tensor:
    """Pictures [n, 3, H, W] in [-1, 1] of scenes: so many made full, so many things of a colour or a shape of no name."""
    chosen = [crowd(dice) if dice.random() < crowded else scene for scene in chosen]
    images = []
    for scene in chosen:
        kinds = (kind_of(dice, colours=colours, shapes=shapes) for _ in scene.things)
        images.append(painted(scene, [new_look(kind, dice) if kind else None for kind in kinds]))
    return to_image(np.stack(images))


def crowd(dice: Random) -> Scene:
    """Five to nine things of pairs that are not held out."""
    things = []
    for cell in dice.sample(range(9), dice.randint(5, 9)):
        shape, colour = dice.choice(TRAIN_PAIRS)
        dx, dy = dice.randint(-1, 1), dice.randint(-1, 1)
        things.append(Thing(shape=shape, colour=colour, size=dice.choice(SIZES), cell=cell, dx=dx, dy=dy))
    return Scene(things=tuple(things))


def unseen(tasks: tuple[str, ...], n: int, seed: int) -> tuple[list[Scene], Tensor]:
    """n test scenes and their pictures [n, 3, H, W] in [-1, 1]."""
    found = scenes(tasks, range(n), seed=seed, split="test")
    return found, to_image(np.stack([painted(scene, [None] * len(scene.things)) for scene in found]))


def returned(redrawn: Callable[[Tensor], Tensor], found: Sequence[Scene], image: Tensor) -> dict[str, float]:
    """The part of scenes that is read fully right from what comes of their pictures [n, 3, H, W], and decibels."""
    right, square = 0, 0.0
    for first in range(0, len(found), JUDGED_AT_ONCE):
        part, scenes_of_part = image[first : first + JUDGED_AT_ONCE], found[first : first + JUDGED_AT_ONCE]
        drawn = redrawn(part).cpu().float()
        square += (drawn.clamp(-1, 1) - part).square().sum().item()
        right += sum(reads(pixels, scene) for pixels, scene in zip(to_pixels(drawn), scenes_of_part, strict=True))
    psnr = -10 * float(np.log10(square / image.numel() / 4))
    return {"scenes": len(found), "scenes_right": right / len(found), "psnr": psnr}


def reads(pixels: NDArray[np.uint8], scene: Scene) -> bool:
    """Whether exactly the scene's things are read from the picture: shape, colour, size and cell."""
    seen = sorted((one.shape, one.colour, one.size, place_of(one.x, one.y)) for one in read(pixels))
    return seen == sorted((one.shape, one.colour, one.size, one.place) for one in scene.things)
