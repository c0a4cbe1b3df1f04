"""Augmentation by novel attributes: objects in colours far from every named one, or of shapes that are none of the six.

They teach what a word means apart from the others: "a square" may have any colour, and "a purple thing" any shape. For
training only: no test example holds them.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from unimm.data.shapes.goal import Example
from unimm.data.shapes.language import article, plural
from unimm.data.shapes.scene_parser import MIN_COVER, connected_components
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
# the palette mixed with the background as far as the parser still takes it for the colour
_PALE = tuple(
    tuple(round(MIN_COVER * a + (1 - MIN_COVER) * b) for a, b in zip(colour, BACKGROUND, strict=True))
    for colour in PALETTE.values()
)
NAMED_COLOURS = (BACKGROUND, *PALETTE.values(), *_PALE)
# cells of a novel shape along each side of its box
GRID = 4


# the first halves of the names of tasks whose examples are augmented; a plan names what a drawing should hold
AUGMENTED_GROUPS = ("draw", "edit", "answer", "caption", "plan")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What an example says: its prompt and, where its output is a text, the answer."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class NovelAttributes:
    """The colour, or the outline, that replaces an object's own.

    colour: RGB; shape: the cells of its box that it fills, [GRID, GRID].
    """

    colour: tuple[int, ...] | None = None
    shape: NDArray[np.bool_] | None = None


def sample_novel_attributes(kind: str, rng: Random) -> NovelAttributes:
    """A novel colour for the kind "colour", a novel shape for "shape"."""
    if kind == "colour":
        return NovelAttributes(colour=sample_novel_colour(rng))
    return NovelAttributes(shape=sample_novel_shape(rng))


def sample_novel_colour(rng: Random) -> tuple[int, ...]:
    """A colour that is far from every named one and from the background."""
    while True:
        colour = tuple(rng.randrange(256) for _ in range(3))
        if all(math.dist(colour, other) > MIN_COLOUR_DISTANCE for other in NAMED_COLOURS):
            return colour


def sample_novel_shape(rng: Random) -> NDArray[np.bool_]:
    """A random connected shape that can pass for none of the named ones, which all are their own mirror images."""
    while True:
        cells = np.zeros((GRID, GRID), bool)
        cells.flat[rng.sample(range(GRID**2), rng.randint(5, 9))] = True
        box = cells[cells.any(1)][:, cells.any(0)]
        if (box != box[:, ::-1]).mean() > 0.4 and len(connected_components(cells, min_pixels=1)) == 1:
            return cells


def sample_novel_kind(rng: Random, *, colours: float, shapes: float) -> str | None:
    """The attribute that becomes novel: the "colour" with probability `colours`, the "shape" with `shapes`, else
    none."""
    u = rng.random()
    return "colour" if u < colours else "shape" if u < colours + shapes else None


def render_novel(scene: Scene, novel: Sequence[NovelAttributes | None]) -> ImageArray:
    """The image of a scene, uint8 [64, 64, 3], with novel attributes, or none, for each of its things."""
    plain = tuple(thing for thing, attributes in zip(scene.things, novel, strict=True) if attributes is None)
    canvas = render(Scene(things=plain))
    for thing, attributes in zip(scene.things, novel, strict=True):
        if attributes is None:
            continue
        width = WIDTHS[thing.size]
        cells = np.arange(width) * GRID // width
        shape = attributes.shape
        cover = coverage(thing.shape, width) / FULL_COVERAGE if shape is None else shape[cells][:, cells]
        colour = PALETTE[thing.colour] if attributes.colour is None else attributes.colour
        rows, columns = (slice(at - width // 2, at + width // 2 + 1) for at in (thing.y, thing.x))
        mixed = cover[:, :, None] * np.array(colour) + (1 - cover[:, :, None]) * canvas[rows, columns]
        canvas[rows, columns] = mixed.round().astype(np.uint8)
    return canvas


def augment_novel_attributes(source: Example, rng: Random, *, colours: float, shapes: float) -> Example:
    """The example, of a train split, with some things' colour or shape made novel and out of its texts.

    colours, shapes: the part of the (shape, colour) pairs in the example that lose one or the other. The prompt, and
    an answer, name what is left: "a square", "a purple thing". What is asked keeps its answer: an attribute that the
    question or the answer depends on stays. Goal and scenes stay as they were. An example of the train split never
    comes to show or name a pair that is held out. Facts and reasoning stay as they are.
    """
    if source.task == "draw.favourite" or source.task.split(".")[0] not in AUGMENTED_GROUPS:
        return source
    before = _pairs(source.source_scene)
    after = _pairs(source.target_scene)
    recoloured = [pair for pair in after if pair not in before] if source.task == "edit.recolour" else []
    if source.task == "edit.recolour" and not recoloured:
        # another thing had the new pair already, and novel attributes go by pairs
        return source
    novel: dict[ShapeColour, NovelAttributes] = {}
    texts = Texts(prompt=source.prompt, answer=source.answer)
    for pair in dict.fromkeys([*before, *after]):
        kind = None if pair in recoloured else sample_novel_kind(rng, colours=colours, shapes=shapes)
        reworded = reword_texts(texts, pair, kind, before) if kind else None
        if kind and reworded:
            novel[pair] = sample_novel_attributes(kind, rng)
            texts = reworded
    if recoloured and before[0] in novel:
        # with its new colour the thing keeps its shape, novel or not
        novel[recoloured[0]] = replace(novel[before[0]], colour=None)
    images = (_rerender(source.source_scene, novel),) if source.source_scene else ()
    target = _rerender(source.target_scene, novel) if source.target is not None and source.target_scene else None
    return replace(source, prompt=texts.prompt, answer=texts.answer, images=images, target=target)


def reword_texts(texts: Texts, pair: ShapeColour, kind: str, others: Sequence[ShapeColour]) -> Texts | None:
    """The texts without the pair's colour, or its shape, as the kind says; None where they cannot do without the word.

    others: pairs in the image that the texts are about.
    """
    if texts.answer is None:
        prompt = reword(texts.prompt, pair, kind, others)
        return Texts(prompt=prompt) if prompt else None
    shape, colour = pair
    prompt = texts.prompt
    if len(others) == 1:
        # of a thing that is alone nothing needs to be said
        name = f"{colour} thing" if kind == "colour" else shape
        prompt = re.sub(rf"\bthe {name}\b", "the thing", prompt)
    reworded = [reword(text, pair, kind, others) for text in (prompt, texts.answer)]
    word = colour if kind == "colour" else f"{shape}(s|es)?"
    if any(text is None or re.search(rf"\b{word}\b", text) for text in reworded):
        return None
    return Texts(prompt=str(reworded[0]), answer=reworded[1])


def reword(prompt: str, pair: ShapeColour, kind: str, others: Collection[ShapeColour]) -> str | None:
    """The prompt without the pair's colour, or its shape, as the kind says; None where it cannot do without the word.

    others: pairs in the image that the prompt is about, from which the word that is left must still tell this one.
    """
    shape, colour = pair
    full = f"{colour} {shape}"
    if full not in prompt:
        return None if (f"{colour} thing" if kind == "colour" else f"the {shape}") in prompt else prompt
    axis = 0 if kind == "colour" else 1
    if pair in others and sum(other[axis] == pair[axis] for other in others) > 1:
        return None
    if kind == "colour":
        return prompt.replace(article(full), article(shape)).replace(full, shape)
    return prompt.replace(f"{colour} {plural(shape)}", f"{colour} things").replace(full, f"{colour} thing")


def _pairs(scene: Scene | None) -> list[ShapeColour]:
    return [thing.pair for thing in scene.things] if scene else []


def _rerender(scene: Scene, novel: Mapping[ShapeColour, NovelAttributes]) -> ImageArray:
    return render_novel(scene, [novel.get(thing.pair) for thing in scene.things])
