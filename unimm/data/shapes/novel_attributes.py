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
from unimm.data.shapes.patches import connected_components
from unimm.data.shapes.scene_parser import MIN_COVER
from unimm.data.shapes.world import (
    BACKGROUND,
    FULL_COVERAGE,
    PALETTE,
    WIDTHS,
    ImageArray,
    Scene,
    ShapeColour,
    coverage,
    render,
)

# colours closer than this, of 442 between black and white, may pass for each other
MIN_COLOUR_DISTANCE = 60
# every named colour, also seen through a veil as pale as the reader takes for it
NAMED_COLOURS = (
    BACKGROUND,
    *PALETTE.values(),
    *(
        tuple(round(MIN_COVER * a + (1 - MIN_COVER) * b) for a, b in zip(c, BACKGROUND, strict=True))
        for c in PALETTE.values()
    ),
)
# pieces of a blob along each side of its box
GRID = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class NovelAttributes:
    """What a thing has in place of its colour, or of its shape: pieces of its box, [PIECES, PIECES]."""

    colour: tuple[int, ...] | None = None
    shape: NDArray[np.bool_] | None = None


def sample_novel_attributes(kind: str, rng: Random) -> NovelAttributes:
    """A colour of no name for the kind "colour", a shape of no name for "shape"."""
    return (
        NovelAttributes(colour=sample_novel_colour(rng))
        if kind == "colour"
        else NovelAttributes(shape=sample_novel_shape(rng))
    )


def sample_novel_colour(rng: Random) -> tuple[int, ...]:
    """A colour that is far from every named one and from the background."""
    while True:
        colour = tuple(rng.randrange(256) for _ in range(3))
        if all(math.dist(colour, other) > MIN_COLOUR_DISTANCE for other in NAMED_COLOURS):
            return colour


def sample_novel_shape(rng: Random) -> NDArray[np.bool_]:
    """A random shape in one piece that can pass for none of the named ones, which all are their own mirror images."""
    while True:
        grid = np.zeros((GRID, GRID), bool)
        grid.flat[rng.sample(range(GRID**2), rng.randint(5, 9))] = True
        box = grid[grid.any(1)][:, grid.any(0)]
        if (box != box[:, ::-1]).mean() > 0.4 and len(connected_components(grid, min_pixels=1)) == 1:
            return grid


def sample_novel_kind(rng: Random, *, colours: float, shapes: float) -> str | None:
    """What shall have no name: the "colour" so often, the "shape" so often, else nothing."""
    at = rng.random()
    return "colour" if at < colours else "shape" if at < colours + shapes else None


def render_novel(scene: Scene, novel: Sequence[NovelAttributes | None]) -> ImageArray:
    """The scene with a look, or its own, for each of its things, uint8 [64, 64, 3]."""
    plain = tuple(thing for thing, look in zip(scene.things, novel, strict=True) if look is None)
    canvas = render(Scene(things=plain))
    for thing, look in zip(scene.things, novel, strict=True):
        if look is None:
            continue
        width = WIDTHS[thing.size]
        pieces = np.arange(width) * GRID // width
        cover = coverage(thing.shape, width) / FULL_COVERAGE if look.shape is None else look.shape[pieces][:, pieces]
        colour = PALETTE[thing.colour] if look.colour is None else look.colour
        rows, columns = (slice(at - width // 2, at + width // 2 + 1) for at in (thing.y, thing.x))
        mixed = cover[:, :, None] * np.array(colour) + (1 - cover[:, :, None]) * canvas[rows, columns]
        canvas[rows, columns] = mixed.round().astype(np.uint8)
    return canvas


def augment_novel_attributes(source: Example, rng: Random, *, colours: float, shapes: float) -> Example:
    """A drawing or an edit in which some things have no name: of the pairs in it, so many lose colour or shape.

    The prompt says what is left: "a square", "a purple thing". Goal and scenes stay as they were. Of an example of the
    train split none comes that shows or names a pair that is held out. Facts, and what neither draws nor edits, stay as
    they are.
    """
    if source.task == "draw.favourite" or not source.task.startswith(("draw.", "edit.")):
        return source
    before, after = (
        [thing.pair for thing in scene.things] if scene else [] for scene in (source.source_scene, source.target_scene)
    )
    recoloured = [pair for pair in after if pair not in before] if source.task == "edit.recolour" else []
    if source.task == "edit.recolour" and not recoloured:
        # another thing had the new pair already, and looks go by pairs
        return source
    looks: dict[ShapeColour, NovelAttributes] = {}
    prompt = source.prompt
    for pair in dict.fromkeys([*before, *after]):
        kind = None if pair in recoloured else sample_novel_kind(rng, colours=colours, shapes=shapes)
        said = reword(prompt, pair, kind, before) if kind else None
        if kind and said:
            looks[pair], prompt = sample_novel_attributes(kind, rng), said
    if recoloured and before[0] in looks:
        # with its new colour the thing keeps its shape, named or not
        looks[recoloured[0]] = replace(looks[before[0]], colour=None)
    images = tuple(_rerender(scene, looks) for scene in (source.source_scene,) if scene)
    return replace(
        source,
        prompt=prompt,
        images=images,
        target=_rerender(source.target_scene, looks) if source.target_scene else None,
    )


def reword(prompt: str, pair: ShapeColour, kind: str, others: Collection[ShapeColour]) -> str | None:
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


def _rerender(scene: Scene, novel: dict[ShapeColour, NovelAttributes]) -> ImageArray:
    return render_novel(scene, [novel.get(thing.pair) for thing in scene.things])
