"""Tasks that edit an image; what the prompt does not name stays as it was, to the pixel."""

from collections.abc import Sequence
from dataclasses import replace

from unimm.data.shapes.goal import Example, ImageGoal, WantedObject
from unimm.data.shapes.language import ADD, RECOLOUR, REMOVE, RESIZE, SWAP, describe, referring_expressions
from unimm.data.shapes.rng import ExampleRng
from unimm.data.shapes.world import RELATIONS, SIZES, Scene, ShapeColour, Thing, related, render


def _edit_example(task: str, prompt: str, before: Scene, after: Scene, goal: ImageGoal | None = None) -> Example:
    """An example whose goal, unless given, is every thing of `after` at its place."""
    goal = goal or ImageGoal(wants=tuple(_unchanged(thing) for thing in after.things))
    return Example(
        task=task,
        prompt=prompt,
        goal=goal,
        images=(render(before),),
        target=render(after),
        source_scene=before,
        target_scene=after,
    )


def _unchanged(thing: Thing) -> WantedObject:
    """The goal of a thing with all its attributes, where it is."""
    return WantedObject(shape=thing.shape, colour=thing.colour, size=thing.size, position=(thing.x, thing.y))


def _scene_with(rng: ExampleRng, pair: ShapeColour, n: int) -> Scene:
    """A scene of n things of different pairs, the first of the given pair."""
    pairs = [pair]
    while len(pairs) < n:
        pairs.append(rng.other_pair(lambda other: other not in pairs))
    return rng.scene(pairs)


def _others(scene: Scene, thing: Thing) -> tuple[Thing, ...]:
    """The other things of the scene."""
    return tuple(other for other in scene.things if other is not thing)


def edit_recolour(task: str, rng: ExampleRng) -> Example:
    """make the red circle green: the pair of the result is the example's subject."""
    shape, colour = rng.subject()
    start = rng.other_pair(lambda pair: pair[0] == shape and pair[1] != colour)
    before = _scene_with(rng, start, rng.integer(1, 3))
    thing = before.things[0]
    after = Scene(things=(replace(thing, colour=colour), *_others(before, thing)))
    prompt = rng.choice(RECOLOUR).format(what=rng.choice(referring_expressions(thing, before)), colour=colour)
    return _edit_example(task, prompt, before, after)


def edit_remove(task: str, rng: ExampleRng) -> Example:
    """remove the red circle: where it is the only thing, an empty image is left."""
    before = _scene_with(rng, rng.subject(), rng.integer(1, 3))
    thing = before.things[0]
    after = Scene(things=_others(before, thing))
    prompt = rng.choice(REMOVE).format(what=rng.choice(referring_expressions(thing, before)))
    return _edit_example(task, prompt, before, after)


def edit_add(task: str, rng: ExampleRng) -> Example:
    """add a blue square: half of the time in a relation to a thing that is there."""
    pairs = rng.distinct_pairs(rng.integer(2, 4))
    scene = rng.scene(pairs)
    new, *old = scene.things
    sized = rng.coin()
    words = describe(new, size=sized)
    want = WantedObject(shape=new.shape, colour=new.colour, size=new.size if sized else None)
    before = Scene(things=tuple(old))
    relations: tuple[tuple[int, str, int], ...] = ()
    if rng.coin():
        index, relation = rng.choice(_relations_of(new, old))
        words = f"{words} {relation} {rng.choice(referring_expressions(old[index], before))}"
        relations = ((0, relation, index + 1),)
    goal = ImageGoal(wants=(want, *(_unchanged(thing) for thing in old)), relations=relations)
    return _edit_example(task, rng.choice(ADD).format(what=words), before, scene, goal)


def _relations_of(new: Thing, old: Sequence[Thing]) -> list[tuple[int, str]]:
    """Each relation of the new thing to an old one, with the index of the old one; different cells always have one."""
    return [
        (index, relation)
        for index, thing in enumerate(old)
        for relation in RELATIONS
        if related((new.x, new.y), relation, (thing.x, thing.y))
    ]


def edit_swap(task: str, rng: ExampleRng) -> Example:
    """swap the red circle and the blue square: each stands where the other stood."""
    before = _scene_with(rng, rng.subject(), rng.integer(2, 3))
    a, b = before.things[:2]
    a_moved = replace(a, cell=b.cell, dx=b.dx, dy=b.dy)
    b_moved = replace(b, cell=a.cell, dx=a.dx, dy=a.dy)
    after = Scene(things=(a_moved, b_moved, *before.things[2:]))
    first, second = rng.shuffled([rng.choice(referring_expressions(thing, before)) for thing in (a, b)])
    return _edit_example(task, rng.choice(SWAP).format(a=first, b=second), before, after)


def edit_resize(task: str, rng: ExampleRng) -> Example:
    """make the red circle small: where it was large, or the other way round."""
    before = _scene_with(rng, rng.subject(), rng.integer(1, 3))
    thing = before.things[0]
    size = next(size for size in SIZES if size != thing.size)
    after = Scene(things=(replace(thing, size=size), *_others(before, thing)))
    prompt = rng.choice(RESIZE).format(what=rng.choice(referring_expressions(thing, before)), size=size)
    return _edit_example(task, prompt, before, after)
