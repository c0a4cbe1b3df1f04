"""Tasks that change a picture; what is not named stays as it was, to the pixel."""

from dataclasses import replace

from unimm.data.shapes.goal import Drawing, Example, Want
from unimm.data.shapes.language import ADD, RECOLOUR, REMOVE, RESIZE, SWAP, names, phrase
from unimm.data.shapes.rng import Dice
from unimm.data.shapes.world import RELATIONS, SIZES, Pair, Scene, Thing, related, render


def _edited(task: str, prompt: str, before: Scene, after: Scene, goal: Drawing | None = None) -> Example:
    """An example whose goal, unless given, is every thing of after at its place."""
    goal = goal or Drawing(wants=tuple(_kept(thing) for thing in after.things))
    images, target = (render(before),), render(after)
    return Example(task=task, prompt=prompt, goal=goal, images=images, target=target, before=before, after=after)


def _kept(thing: Thing) -> Want:
    """The thing with all its attributes, where it is."""
    return Want(shape=thing.shape, colour=thing.colour, size=thing.size, at=(thing.x, thing.y))


def _around(dice: Dice, pair: Pair, n: int) -> Scene:
    """A scene of n things of different pairs, the first of the given pair."""
    pairs = [pair]
    while len(pairs) < n:
        pairs.append(dice.other(lambda other: other not in pairs))
    return dice.scene(pairs)


def _without(scene: Scene, thing: Thing) -> tuple[Thing, ...]:
    """The other things of the scene."""
    return tuple(other for other in scene.things if other is not thing)


def recolour(task: str, dice: Dice) -> Example:
    """make the red circle green; the pair that comes of it is the one asked for."""
    shape, colour = dice.asked()
    start = dice.other(lambda pair: pair[0] == shape and pair[1] != colour)
    before = _around(dice, start, dice.whole(1, 3))
    thing = before.things[0]
    after = Scene(things=(replace(thing, colour=colour), *_without(before, thing)))
    prompt = dice.choice(RECOLOUR).format(what=dice.choice(names(thing, before)), colour=colour)
    return _edited(task, prompt, before, after)


def remove(task: str, dice: Dice) -> Example:
    """remove the red circle; the last one leaves an empty canvas."""
    before = _around(dice, dice.asked(), dice.whole(1, 3))
    thing = before.things[0]
    after = Scene(things=_without(before, thing))
    return _edited(task, dice.choice(REMOVE).format(what=dice.choice(names(thing, before))), before, after)


def add(task: str, dice: Dice) -> Example:
    """add a blue square, half of the time in a relation to a thing that is there."""
    pairs = dice.pairs(dice.whole(2, 4))
    scene = dice.scene(pairs)
    new, old = scene.things[0], scene.things[1:]
    sized = dice.coin()
    words = phrase(new, size=sized)
    want = Want(shape=new.shape, colour=new.colour, size=new.size if sized else None)
    before = Scene(things=old)
    relations: tuple[tuple[int, str, int], ...] = ()
    if dice.coin():
        index, relation = dice.choice(_relations_of(new, old))
        words = f"{words} {relation} {dice.choice(names(old[index], before))}"
        relations = ((0, relation, index + 1),)
    goal = Drawing(wants=(want, *(_kept(thing) for thing in old)), relations=relations)
    return _edited(task, dice.choice(ADD).format(what=words), before, scene, goal)


def _relations_of(new: Thing, old: tuple[Thing, ...]) -> list[tuple[int, str]]:
    """Each relation in which new stands to a thing, by the thing's index; different cells always give one."""
    return [
        (index, relation)
        for index, thing in enumerate(old)
        for relation in RELATIONS
        if related((new.x, new.y), relation, (thing.x, thing.y))
    ]


def swap(task: str, dice: Dice) -> Example:
    """swap the red circle and the blue square: each stands where the other stood."""
    before = _around(dice, dice.asked(), dice.whole(2, 3))
    a, b = before.things[:2]
    moved = replace(a, cell=b.cell, dx=b.dx, dy=b.dy), replace(b, cell=a.cell, dx=a.dx, dy=a.dy)
    after = Scene(things=(*moved, *before.things[2:]))
    first, second = dice.mixed([dice.choice(names(thing, before)) for thing in (a, b)])
    return _edited(task, dice.choice(SWAP).format(a=first, b=second), before, after)


def resize(task: str, dice: Dice) -> Example:
    """make the red circle small, where it was large."""
    before = _around(dice, dice.asked(), dice.whole(1, 3))
    thing = before.things[0]
    size = next(size for size in SIZES if size != thing.size)
    after = Scene(things=(replace(thing, size=size), *_without(before, thing)))
    prompt = dice.choice(RESIZE).format(what=dice.choice(names(thing, before)), size=size)
    return _edited(task, prompt, before, after)
