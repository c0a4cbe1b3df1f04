"""Things without a name: far from every named one, said by what is left of their name, and never a pair that is held
out."""

import math
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from unimm.data.shapes import HELD_OUT, PALETTE, SHAPES, TASKS, Scene, example, parse_scene, render
from unimm.data.shapes.language import NUMBERS, plural
from unimm.data.shapes.novel_attributes import (
    MIN_COLOUR_DISTANCE,
    augment_novel_attributes,
    render_novel,
    reword,
    sample_novel_attributes,
    sample_novel_colour,
)
from unimm.data.shapes.world import BACKGROUND, WIDTHS

CHANGED = tuple(task for task in TASKS if task.startswith(("draw.", "edit.")) and task != "draw.favourite")


def test_colours_are_far_from_the_named_ones():
    dice = random.Random(0)
    for _ in range(50):
        colour = sample_novel_colour(dice)
        assert min(math.dist(colour, other) for other in (*PALETTE.values(), BACKGROUND)) > MIN_COLOUR_DISTANCE


def test_a_thing_keeps_what_it_does_not_lose():
    scene, dice = example("draw.one", 0).target_scene, random.Random(0)
    (thing,) = scene.things
    empty = render(Scene(things=()))
    recoloured = (render_novel(scene, [sample_novel_attributes("colour", dice)]) != empty).any(-1)
    assert np.array_equal(recoloured, (render(scene) != empty).any(-1)), "the same shape at the same place"
    blob = render_novel(scene, [sample_novel_attributes("shape", dice)])
    assert {tuple(pixel) for pixel in blob.reshape(-1, 3).tolist()} == {BACKGROUND, PALETTE[thing.colour]}
    assert np.array_equal(render_novel(scene, [None]), render(scene))


@pytest.mark.parametrize(
    ("prompt", "pair", "kind", "others", "expected"),
    [
        ("an orange circle", ("circle", "orange"), "colour", [], "a circle"),
        ("draw four small red crosses", ("cross", "red"), "shape", [], "draw four small red things"),
        ("a red circle left of a red cross", ("cross", "red"), "colour", [], "a red circle left of a cross"),
        ("remove the red thing", ("cross", "red"), "shape", [("cross", "red")], "remove the red thing"),
        ("remove the red thing", ("cross", "red"), "colour", [("cross", "red")], None),
        ("remove the cross", ("cross", "red"), "shape", [("cross", "red")], None),
        ("remove the red cross", ("cross", "red"), "colour", [("cross", "red"), ("cross", "blue")], None),
        (
            "remove the red cross",
            ("cross", "red"),
            "shape",
            [("cross", "red"), ("cross", "blue")],
            "remove the red thing",
        ),
    ],
)
def test_a_prompt_says_what_is_left(prompt, pair, kind, others, expected):
    assert reword(prompt, pair, kind, others) == expected


@pytest.mark.parametrize("task", CHANGED)
def test_nothing_held_out_is_shown_or_named(task):
    dice, changed = random.Random(task), 0
    held_out = {form for shape, colour in HELD_OUT for form in (f"{colour} {shape}", f"{colour} {plural(shape)}")}
    for index in range(150):
        one = example(task, index)
        new = augment_novel_attributes(one, dice, colours=0.3, shapes=0.3)
        changed += new.target is not None and not np.array_equal(new.target, one.target)
        assert not any(words in new.prompt for words in held_out)
        for image in (*new.images, new.target):
            assert not {(seen.shape, seen.colour) for seen in parse_scene(image)} & set(HELD_OUT)
    assert changed > 30


ASKED = tuple(task for task in TASKS if task.startswith(("answer.", "caption")))


def words(text: str) -> set[str]:
    """The words of a text, plurals as their singulars."""
    found = set(re.findall(r"[a-z]+", text))
    return found | {shape for shape in SHAPES if plural(shape) in found}


@pytest.mark.parametrize("task", ASKED)
def test_a_question_keeps_its_answer(task):
    """What the image shows still has the answer, worked out anew from what each thing has left."""
    dice, changed = random.Random(task), 0
    for index in range(200):
        one = example(task, index)
        new = augment_novel_attributes(one, dice, colours=0.3, shapes=0.3)
        changed += not np.array_equal(new.images[0], one.images[0])
        seen = [(t.shape, t.colour) for t in what_is_left(one.source_scene, new.images[0])]
        assert not set(seen) & set(HELD_OUT)
        named = words(new.prompt) | words(new.answer)
        if task == "answer.count":
            shape, colour = (next((w for w in group if w in named), None) for group in (SHAPES, PALETTE))
            fits = [pair for pair in seen if shape in (None, pair[0]) and colour in (None, pair[1])]
            assert NUMBERS[len(fits)] == new.answer
        elif task == "answer.there":
            shape, colour = (next((w for w in group if w in named), None) for group in (SHAPES, PALETTE))
            found = any(shape in (None, pair[0]) and colour in (None, pair[1]) for pair in seen)
            assert new.answer == ("yes" if found else "no")
        else:
            shown = {attribute for pair in seen for attribute in pair}
            about = (named & {*SHAPES, *PALETTE}) - ({*SHAPES} if "more" in named else set())
            assert about <= shown, f"{new.prompt} {new.answer}: it names what the image does not show"
        if task.startswith("caption"):
            assert new.answer.count(" thing") + sum(new.answer.count(shape) for shape in SHAPES) == len(seen)
    assert changed > 30


def what_is_left(scene: Scene, image: np.ndarray) -> list[SimpleNamespace]:
    """The shape and colour of each thing of the scene that the image still shows, None for one that is novel."""
    left = []
    for thing in scene.things:
        y, x = (slice(at - WIDTHS[thing.size] // 2, at + WIDTHS[thing.size] // 2 + 1) for at in (thing.y, thing.x))
        plain = render(scene)[y, x]
        same_outline = np.array_equal((image[y, x] != BACKGROUND).any(-1), (plain != BACKGROUND).any(-1))
        centre = image[y, x][image[y, x].shape[0] // 2, image[y, x].shape[1] // 2]
        colours = {tuple(pixel) for pixel in image[y, x].reshape(-1, 3).tolist()}
        left.append(
            SimpleNamespace(
                shape=thing.shape if same_outline else None,
                colour=thing.colour
                if PALETTE[thing.colour] in colours or tuple(centre) == PALETTE[thing.colour]
                else None,
            )
        )
    return left


def test_facts_and_reasoning_stay():
    for task in TASKS:
        if task.startswith(("fact.", "reason.")) or task == "draw.favourite":
            one = example(task, 3)
            assert augment_novel_attributes(one, random.Random(0), colours=0.5, shapes=0.5) is one


@pytest.mark.parametrize("task", [task for task in CHANGED if task.startswith("edit.")])
def test_an_edit_leaves_the_others_to_the_pixel(task):
    """What changes lies where it changed in the named example, things without a name or not."""
    dice = random.Random(0)
    for index in range(60):
        one = example(task, index)
        new = augment_novel_attributes(one, dice, colours=0.4, shapes=0.4)
        moved = set(one.source_scene.things) ^ set(one.target_scene.things)
        free = np.zeros(one.target.shape[:2], bool)
        for thing in moved:
            free[thing.y - 8 : thing.y + 9, thing.x - 8 : thing.x + 9] = True
        assert ((new.images[0] == new.target).all(-1) | free).all()
        assert not np.array_equal(new.images[0], new.target)


def test_a_recoloured_blob_keeps_its_shape_and_takes_the_named_colour():
    seen = Counter()
    for index in range(200):
        one = example("edit.recolour", index)
        new = augment_novel_attributes(one, random.Random(index), colours=0.0, shapes=1.0)
        thing, after = one.source_scene.things[0], one.target_scene.things[0]
        y, x = (slice(at - 8, at + 9) for at in (thing.y, thing.x))
        was, is_now = (image[y, x] != BACKGROUND for image in (new.images[0], new.target))
        seen[bool(np.array_equal(was.any(-1), is_now.any(-1)))] += 1
        blob = not np.array_equal(new.target[y, x], render(one.target_scene)[y, x])
        assert not blob or (new.target[y, x][is_now.any(-1)] == PALETTE[after.colour]).all()
    assert set(seen) == {True}
