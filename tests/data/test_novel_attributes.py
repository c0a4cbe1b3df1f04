"""Things without a name: far from every named one, said by what is left of their name, and never a pair that is held
out."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from unimm.data.shapes import HELD_OUT, PALETTE, TASKS, Scene, example, parse_scene, render
from unimm.data.shapes.language import plural
from unimm.data.shapes.novel_attributes import (
    MIN_COLOUR_DISTANCE,
    augment_novel_attributes,
    render_novel,
    reword,
    sample_novel_attributes,
    sample_novel_colour,
)
from unimm.data.shapes.world import BACKGROUND

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
