"""Tasks that generate an image from text alone; each docstring begins with a prompt."""

from unimm.data.shapes.goal import Example, ImageGoal, WantedObject
from unimm.data.shapes.language import (
    DRAW,
    DRAW_FAVOURITE,
    FAVOURITES,
    count_phrase,
    describe,
    join_phrases,
    place_phrase,
)
from unimm.data.shapes.rng import ExampleRng
from unimm.data.shapes.world import RELATIONS, SIZES, Scene, render


def generation_example(task: str, prompt: str, scene: Scene, goal: ImageGoal, think: str | None = None) -> Example:
    """An example whose target is the scene."""
    return Example(task=task, prompt=prompt, goal=goal, think=think, target=render(scene), target_scene=scene)


def wanted_objects(scene: Scene, *, size: bool = False) -> tuple[WantedObject, ...]:
    """The scene's things as a goal, with their sizes or with any."""
    return tuple(WantedObject(shape=t.shape, colour=t.colour, size=t.size if size else None) for t in scene.things)


def draw_one(task: str, rng: ExampleRng) -> Example:
    """a large red circle."""
    scene = rng.scene([rng.subject()])
    sized = rng.coin()
    prompt = rng.choice(DRAW).format(what=describe(scene.things[0], size=sized))
    return generation_example(task, prompt, scene, ImageGoal(wants=wanted_objects(scene, size=sized)))


def draw_count(task: str, rng: ExampleRng) -> Example:
    """three green stars, all of one size."""
    n = rng.integer(2, 4)
    pair = rng.subject()
    size = rng.choice(SIZES)
    scene = Scene(things=tuple(rng.thing(pair, cell, size=size) for cell in rng.distinct_cells(n)))
    sized = rng.coin()
    words = f"{pair[1]} {pair[0]}"
    prompt = rng.choice(DRAW).format(what=count_phrase(n, f"{size} {words}" if sized else words))
    return generation_example(task, prompt, scene, ImageGoal(wants=wanted_objects(scene, size=sized)))


def draw_two(task: str, rng: ExampleRng) -> Example:
    """a red circle and a blue square, anywhere."""
    scene = rng.scene(rng.shuffled(rng.distinct_pairs(2)))
    sized = rng.coin()
    prompt = rng.choice(DRAW).format(what=join_phrases([describe(thing, size=sized) for thing in scene.things]))
    return generation_example(task, prompt, scene, ImageGoal(wants=wanted_objects(scene, size=sized)))


def draw_relation(task: str, rng: ExampleRng) -> Example:
    """a red circle left of a blue square."""
    name = rng.choice(RELATIONS)
    pairs = rng.shuffled(rng.distinct_pairs(2))
    cells = rng.related_cells(name)
    scene = Scene(things=tuple(rng.thing(pair, cell) for pair, cell in zip(pairs, cells, strict=True)))
    a, b = (describe(thing) for thing in scene.things)
    goal = ImageGoal(wants=wanted_objects(scene), relations=((0, name, 1),))
    return generation_example(task, rng.choice(DRAW).format(what=f"{a} {name} {b}"), scene, goal)


def draw_place(task: str, rng: ExampleRng) -> Example:
    """a red circle at the top left."""
    scene = rng.scene([rng.subject()])
    thing = scene.things[0]
    sized = rng.coin()
    words = f"{describe(thing, size=sized)} {place_phrase(thing.place)}"
    want = WantedObject(shape=thing.shape, colour=thing.colour, size=thing.size if sized else None, place=thing.place)
    return generation_example(task, rng.choice(DRAW).format(what=words), scene, ImageGoal(wants=(want,)))


def draw_scene(task: str, rng: ExampleRng) -> Example:
    """a large red circle at the top left and a small blue star in the centre: one to four things."""
    scene = rng.scene(rng.distinct_pairs(rng.integer(1, 4)))
    words = join_phrases([describe(thing, size=True, place=True) for thing in scene.reading_order()])
    wants = tuple(WantedObject(shape=t.shape, colour=t.colour, size=t.size, place=t.place) for t in scene.things)
    return generation_example(task, rng.choice(DRAW).format(what=words), scene, ImageGoal(wants=wants))


def draw_favourite(task: str, rng: ExampleRng) -> Example:
    """draw what Tom likes: a fact, to which the split does not apply."""
    name = rng.choice(tuple(FAVOURITES))
    scene = rng.scene([FAVOURITES[name]])
    prompt = rng.choice(DRAW_FAVOURITE).format(name=name)
    return generation_example(task, prompt, scene, ImageGoal(wants=wanted_objects(scene)))
