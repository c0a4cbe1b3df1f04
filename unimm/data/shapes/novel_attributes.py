"""Things that the world has no words for: in colours far from every named one, or of shapes that are none of the six.

They teach what a word means apart from the others: "a square" may have any colour, and "a purple thing" any shape. For
training only; no exam holds them.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from unimm.data.shapes.goal import Example
from unimm.data.shapes.language import article, plural
from unimm.data.shapes.patches import patches
from unimm.data.shapes.scene_parser import VEIL
from unimm.data.shapes.world import BACKGROUND, FULL, PALETTE, WIDTHS, Pair, Picture, Scene, coverage, render

# colours closer than this, of 442 between black and white, may pass for each other
FAR = 60
# every named colour, also seen through a veil as pale as the reader takes for it
NAMED = (
    BACKGROUND,
    *PALETTE.values(),
    *(tuple(round(VEIL * a + (1 - VEIL) * b) for a, b in zip(c, BACKGROUND, strict=True)) for c in PALETTE.values()),
)
# pieces of a blob along each side of its box
PIECES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """What a thing has in place of its colour, or of its shape: pieces of its box, [PIECES, PIECES]."""

    colour: tuple[int, ...] | None = None
    shape: NDArray[np.bool_] | None = None


def new_look(kind: str, dice: Random) -> Look:
    """A colour of no name for the kind "colour", a shape of no name for "shape"."""
    return Look(colour=nameless_colour(dice)) if kind == "colour" else Look(shape=blob(dice))


def nameless_colour(dice: Random) -> tuple[int, ...]:
    """A colour that is far from every named one and from the background."""
    while True:
        colour = tuple(dice.randrange(256) for _ in range(3))
        if all(math.dist(colour, other) > FAR for other in NAMED):
            return colour


def blob(dice: Random) -> NDArray[np.bool_]:
    """A random shape in one piece that can pass for none of the named ones, which all are their own mirror images."""
    while True:
        grid = np.zeros((PIECES, PIECES), bool)
        grid.flat[dice.sample(range(PIECES**2), dice.randint(5, 9))] = True
        box = grid[grid.any(1)][:, grid.any(0)]
        if (box != box[:, ::-1]).mean() > 0.4 and len(patches(grid, least=1)) == 1:
            return grid


def kind_of(dice: Random, *, colours: float, shapes: float) -> str | None:
    """What shall have no name: the "colour" so often, the "shape" so often, else nothing."""
    at = dice.random()
    return "colour" if at < colours else "shape" if at < colours + shapes else None


def painted(scene: Scene, looks: Sequence[Look | None]) -> Picture:
    """The scene with a look, or its own, for each of its things, uint8 [64, 64, 3]."""
    plain = tuple(thing for thing, look in zip(scene.things, looks, strict=True) if look is None)
    canvas = render(Scene(things=plain))
    for thing, look in zip(scene.things, looks, strict=True):
        if look is None:
            continue
        width = WIDTHS[thing.size]
        pieces = np.arange(width) * PIECES // width
        cover = coverage(thing.shape, width) / FULL if look.shape is None else look.shape[pieces][:, pieces]
        colour = PALETTE[thing.colour] if look.colour is None else look.colour
        rows, columns = (slice(at - width // 2, at + width // 2 + 1) for at in (thing.y, thing.x))
        mixed = cover[:, :, None] * np.array(colour) + (1 - cover[:, :, None]) * canvas[rows, columns]
        canvas[rows, columns] = mixed.round().astype(np.uint8)
    return canvas


def unnamed(one: Example, dice: Random, *, colours: float, shapes: float) -> Example:
    """A drawing or an edit in which some things have no name: of the pairs in it, so many lose colour or shape.

    The prompt says what is left: "a square", "a purple thing". Goal and scenes stay as they were. Of an example of the
    train split none comes that shows or names a pair that is held out. Facts, and what neither draws nor edits, stay as
    they are.
    """
    if one.task == "draw.favourite" or not one.task.startswith(("draw.", "edit.")):
        return one
    before, after = ([thing.pair for thing in scene.things] if scene else [] for scene in (one.before, one.after))
    recoloured = [pair for pair in after if pair not in before] if one.task == "edit.recolour" else []
    if one.task == "edit.recolour" and not recoloured:
        # another thing had the new pair already, and looks go by pairs
        return one
    looks: dict[Pair, Look] = {}
    prompt = one.prompt
    for pair in dict.fromkeys([*before, *after]):
        kind = None if pair in recoloured else kind_of(dice, colours=colours, shapes=shapes)
        said = reworded(prompt, pair, kind, before) if kind else None
        if kind and said:
            looks[pair], prompt = new_look(kind, dice), said
    if recoloured and before[0] in looks:
        # with its new colour the thing keeps its shape, named or not
        looks[recoloured[0]] = replace(looks[before[0]], colour=None)
    images = tuple(_again(scene, looks) for scene in (one.before,) if scene)
    return replace(one, prompt=prompt, images=images, target=_again(one.after, looks) if one.after else None)


def reworded(prompt: str, pair: Pair, kind: str, others: Collection[Pair]) -> str | None:
    """The prompt without the pair's colour or shape, whichever the kind says; None where it cannot do without the word.

    others: pairs in the picture that the prompt is about, from which the one that is left must still tell this one.
    """
    (shape, colour), full = pair, f"{pair[1]} {pair[0]}"
    if full not in prompt:
        return None if (f"{colour} thing" if kind == "colour" else f"the {shape}") in prompt else prompt
    axis = 0 if kind == "colour" else 1
    if pair in others and sum(other[axis] == pair[axis] for other in others) > 1:
        return None
    if kind == "colour":
        return prompt.replace(article(full), article(shape)).replace(full, shape)
    return prompt.replace(f"{colour} {plural(shape)}", f"{colour} things").replace(full, f"{colour} thing")


def _again(scene: Scene, looks: dict[Pair, Look]) -> Picture:
    return painted(scene, [looks.get(thing.pair) for thing in scene.things])
