"""The released training plans: the parts of a sample, their order, and which of them may be dropped.

docs/originals/bagel.md, "Training plans" (data/interleave_datasets, data/dataset_base.py of the released code).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unimm.sequence.parts import Part, position_gap
from unimm.training.config import RecipeSection
from unimm.training.fields import Fraction


@dataclass(frozen=True)
class PlannedPart:
    """A part of a plan; a droppable one is a condition that guidance compares with its absence.

    with_text: whether it is dropped where the last droppable text before it was.
    """

    part: Part
    droppable: bool = False
    with_text: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageForms:
    """One image in its three forms: clean latents, ViT patches, and noised latents (a target)."""

    vae: Part
    vit: Part
    noised: Part


@dataclass(frozen=True, kw_only=True)
class ConditionDropout(RecipeSection):
    """Probabilities that a droppable text, clean latents and ViT patches are left out; the released script's
    numbers."""

    text: Fraction = 0.1
    vae: Fraction = 0.3
    vit: Fraction = 0.3


def plan_text_to_image(text: Part, target: Part) -> list[PlannedPart]:
    """A caption, then the image to generate."""
    return [PlannedPart(text, droppable=True), PlannedPart(target)]


def plan_edit(source: ImageForms, steps: Sequence[tuple[Part, ImageForms]]) -> list[PlannedPart]:
    """An image, then an instruction and the image that it leads to, once or in several steps.

    An intermediate image is a target first and then, clean and as ViT patches, a condition of the next step; the last
    is a target only.
    """
    parts = [PlannedPart(source.vae, droppable=True), PlannedPart(source.vit, droppable=True)]
    for i, (instruction, result) in enumerate(steps):
        parts += plan_text_to_image(instruction, result.noised)
        if i + 1 < len(steps):
            parts += [PlannedPart(result.vae, droppable=True), PlannedPart(result.vit, droppable=True)]
    return parts


def plan_answer(images: Sequence[Part], messages: Sequence[Part]) -> list[PlannedPart]:
    """Images to understand, then the messages of a chat: those of the assistant carry labels. Nothing is dropped."""
    return [PlannedPart(part) for part in (*images, *messages)]


def drop_conditions(parts: Sequence[PlannedPart], dropout: ConditionDropout, rand: Callable[[], float]) -> list[Part]:
    """The parts that stay: a droppable part is dropped where a number of `rand`, in [0, 1), falls below its rate.

    `rand` is called once for each droppable part, in order. A dropped text leaves nothing; a dropped image still takes
    one rotary position.
    """
    rates = {"text": dropout.text, "gen_image": dropout.vae, "und_image": dropout.vit}
    kept: list[Part] = []
    text_is_dropped = False
    for planned in parts:
        kind = planned.part.kind
        is_dropped = planned.droppable and rand() < rates[kind]
        if planned.droppable and kind == "text":
            text_is_dropped = is_dropped
        if is_dropped:
            kept += [position_gap(1)] if kind != "text" else []
        elif not (planned.with_text and text_is_dropped):
            kept.append(planned.part)
    return kept
