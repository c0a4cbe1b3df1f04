"""The released training plans: what a sample's parts are, in which order, and which of them may be dropped.

docs/originals/bagel.md, "Training plans" (data/interleave_datasets, data/dataset_base.py of the released code).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unimm.sequence.parts import Part, position_gap


@dataclass(frozen=True)
class PlannedPart:
    """An item of a plan; a droppable one is a condition that guidance must learn to do without."""

    part: Part
    droppable: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageForms:
    """One picture in its three forms: clean latents, patches, and noised latents (a target)."""

    vae: Part
    vit: Part
    noised: Part


@dataclass(frozen=True, kw_only=True)
class ConditionDropout:
    """How often a droppable part is left out; the released training script's numbers."""

    text: float = 0.1
    vae: float = 0.3
    vit: float = 0.3


def plan_text_to_image(text: Part, target: Part) -> list[PlannedPart]:
    """A caption, then the picture to draw."""
    return [PlannedPart(text, droppable=True), PlannedPart(target)]


def plan_edit(source: ImageForms, turns: Sequence[tuple[Part, ImageForms]]) -> list[PlannedPart]:
    """A picture, then an instruction and the picture it leads to, once or in several steps.

    A picture on the way is a target first and then, clean and as patches, a condition of the next step; the last is a
    target only.
    """
    parts = [PlannedPart(source.vae, droppable=True), PlannedPart(source.vit, droppable=True)]
    for i, (instruction, result) in enumerate(turns):
        parts += plan_text_to_image(instruction, result.noised)
        if i + 1 < len(turns):
            parts += [PlannedPart(result.vae, droppable=True), PlannedPart(result.vit, droppable=True)]
    return parts


def plan_answer(looks: Sequence[Part], turns: Sequence[Part]) -> list[PlannedPart]:
    """Pictures to look at, then the turns of a dialogue: those of the assistant carry labels. Nothing is dropped."""
    return [PlannedPart(item) for item in (*looks, *turns)]


def drop_conditions(parts: Sequence[PlannedPart], dropout: ConditionDropout, rand: Callable[[], float]) -> list[Part]:
    """The items that stay: one draw() in [0, 1) for each droppable part, in order, dropped where it falls below its rate.

    A dropped text leaves nothing; a dropped picture still moves the rotary clock.
    """
    rates = {"text": dropout.text, "gen_image": dropout.vae, "und_image": dropout.vit}
    kept: list[Part] = []
    for part in parts:
        if part.droppable and rand() < rates[part.part.kind]:
            kept += [position_gap(1)] if part.part.kind != "text" else []
        else:
            kept.append(part.part)
    return kept
