"""The released training plans: what a sample's parts are, in which order, and which of them may be dropped.

docs/originals/bagel.md, "Training plans" (data/interleave_datasets, data/dataset_base.py of the released code).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unimm.sequence.parts import Item, gap_item


@dataclass(frozen=True)
class Part:
    """An item of a plan; a droppable one is a condition that guidance must learn to do without."""

    item: Item
    droppable: bool = False


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One picture in its three forms: clean latents, patches, and noised latents (a target)."""

    clean: Item
    look: Item
    noised: Item


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """How often a droppable part is left out; the released training script's numbers."""

    text: float = 0.1
    draw: float = 0.3
    look: float = 0.3


def text_to_image(text: Item, target: Item) -> list[Part]:
    """A caption, then the picture to draw."""
    return [Part(text, droppable=True), Part(target)]


def edit(source: Shown, turns: Sequence[tuple[Item, Shown]]) -> list[Part]:
    """A picture, then an instruction and the picture it leads to, once or in several steps.

    A picture on the way is a target first and then, clean and as patches, a condition of the next step; the last is a
    target only.
    """
    parts = [Part(source.clean, droppable=True), Part(source.look, droppable=True)]
    for i, (instruction, result) in enumerate(turns):
        parts += text_to_image(instruction, result.noised)
        if i + 1 < len(turns):
            parts += [Part(result.clean, droppable=True), Part(result.look, droppable=True)]
    return parts


def answer(looks: Sequence[Item], turns: Sequence[Item]) -> list[Part]:
    """Pictures to look at, then the turns of a dialogue: those of the assistant carry labels. Nothing is dropped."""
    return [Part(item) for item in (*looks, *turns)]


def drop(parts: Sequence[Part], dropout: Dropout, draw: Callable[[], float]) -> list[Item]:
    """The items that stay: one draw() in [0, 1) for each droppable part, in order, dropped where it falls below its rate.

    A dropped text leaves nothing; a dropped picture still moves the rotary clock.
    """
    rates = {"text": dropout.text, "draw": dropout.draw, "look": dropout.look}
    kept = []
    for part in parts:
        if part.droppable and draw() < rates[part.item.kind]:
            kept += [gap_item(1)] if part.item.kind != "text" else []
        else:
            kept.append(part.item)
    return kept
