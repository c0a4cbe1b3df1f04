"""Tasks that draw from words alone."""

from unimm.data.shapes.goal import Drawing, Example, Want
from unimm.data.shapes.language import DRAW, DRAW_FAVOURITE, FAVOURITES, at, joined, numbered, phrase
from unimm.data.shapes.rng import Dice
from unimm.data.shapes.world import RELATIONS, Scene, render


def drawn(task: str, prompt: str, scene: Scene, goal: Drawing, think: str | None = None) -> Example:
    """An example whose target is the scene."""
    return Example(task=task, prompt=prompt, goal=goal, think=think, target=render(scene), after=scene)


def wanted(scene: Scene, *, size: bool = False) -> tuple[Want, ...]:
    """The scene's things as wants, their size asked for or free."""
    return tuple(Want(shape=t.shape, colour=t.colour, size=t.size if size else None) for t in scene.things)


def one(task: str, dice: Dice) -> Example:
    """a large red circle."""
    scene = dice.scene([dice.asked()])
    sized = dice.coin()
    prompt = dice.choice(DRAW).format(what=phrase(scene.things[0], size=sized))
    return drawn(task, prompt, scene, Drawing(wants=wanted(scene, size=sized)))


def count(task: str, dice: Dice) -> Example:
    """three green stars, all of one size."""
    n = dice.whole(2, 4)
    pair, size = dice.asked(), dice.choice(("small", "large"))
    scene = Scene(things=tuple(dice.thing(pair, cell, size=size) for cell in dice.cells(n)))
    sized = dice.coin()
    words = f"{pair[1]} {pair[0]}"
    prompt = dice.choice(DRAW).format(what=numbered(n, f"{size} {words}" if sized else words))
    return drawn(task, prompt, scene, Drawing(wants=wanted(scene, size=sized)))


def two(task: str, dice: Dice) -> Example:
    """a red circle and a blue square, anywhere."""
    scene = dice.scene(dice.mixed(dice.pairs(2)))
    sized = dice.coin()
    prompt = dice.choice(DRAW).format(what=joined([phrase(thing, size=sized) for thing in scene.things]))
    return drawn(task, prompt, scene, Drawing(wants=wanted(scene, size=sized)))


def relation(task: str, dice: Dice) -> Example:
    """a red circle left of a blue square."""
    name = dice.choice(RELATIONS)
    pairs = dice.mixed(dice.pairs(2))
    cells = dice.related_cells(name)
    scene = Scene(things=tuple(dice.thing(pair, cell) for pair, cell in zip(pairs, cells, strict=True)))
    a, b = (phrase(thing) for thing in scene.things)
    goal = Drawing(wants=wanted(scene), relations=((0, name, 1),))
    return drawn(task, dice.choice(DRAW).format(what=f"{a} {name} {b}"), scene, goal)


def place(task: str, dice: Dice) -> Example:
    """a red circle at the top left."""
    scene = dice.scene([dice.asked()])
    thing = scene.things[0]
    sized = dice.coin()
    words = f"{phrase(thing, size=sized)} {at(thing.place)}"
    want = Want(shape=thing.shape, colour=thing.colour, size=thing.size if sized else None, place=thing.place)
    return drawn(task, dice.choice(DRAW).format(what=words), scene, Drawing(wants=(want,)))


def full(task: str, dice: Dice) -> Example:
    """One to four objects with size and place."""
    scene = dice.scene(dice.pairs(dice.whole(1, 4)))
    words = joined([phrase(thing, size=True, place=True) for thing in scene.reading_order()])
    wants = tuple(Want(shape=t.shape, colour=t.colour, size=t.size, place=t.place) for t in scene.things)
    return drawn(task, dice.choice(DRAW).format(what=words), scene, Drawing(wants=wants))


def favourite(task: str, dice: Dice) -> Example:
    """draw what Tom likes; a fact, to which the split does not apply."""
    name = dice.choice(tuple(FAVOURITES))
    scene = dice.scene([FAVOURITES[name]])
    return drawn(task, dice.choice(DRAW_FAVOURITE).format(name=name), scene, Drawing(wants=wanted(scene)))
