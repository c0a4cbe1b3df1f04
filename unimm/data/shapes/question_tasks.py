"""Tasks that ask about a picture."""

from unimm.data.shapes.goal import Example, Goal, Listing, Saying
from unimm.data.shapes.language import (
    CAPTION,
    CAPTION_FULL,
    COLOUR,
    COUNT,
    LARGER,
    MORE,
    NUMBERS,
    RELATION,
    SHAPE,
    SMALLER,
    THERE,
    WHERE,
    article,
    joined,
    names,
    phrase,
    plural,
)
from unimm.data.shapes.rng import Dice
from unimm.data.shapes.world import OPPOSITE, RELATIONS, SHAPES, SIZES, Pair, Scene, render

# how many of the first and of the second shape a question compares
AHEAD = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1))
BEHIND = ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 2))


def _asked(task: str, prompt: str, scene: Scene, answer: str, goal: Goal | None = None) -> Example:
    """An example whose goal, unless given, is to say the answer."""
    goal, images = goal or Saying(text=answer), (render(scene),)
    return Example(task=task, prompt=prompt, goal=goal, images=images, answer=answer, before=scene)


def caption(task: str, dice: Dice) -> Example:
    """a red circle, a blue star and a green cross, in reading order."""
    scene = dice.scene(dice.pairs(dice.whole(1, 4)))
    phrases = [phrase(thing) for thing in scene.reading_order()]
    return _asked(task, dice.choice(CAPTION), scene, joined(phrases), Listing(phrases=tuple(phrases)))


def caption_full(task: str, dice: Dice) -> Example:
    """a large red circle at the top left and a small blue star in the centre."""
    scene = dice.scene(dice.pairs(dice.whole(1, 4)))
    phrases = [phrase(thing, size=True, place=True) for thing in scene.reading_order()]
    return _asked(task, dice.choice(CAPTION_FULL), scene, joined(phrases), Listing(phrases=tuple(phrases)))


def _counted(dice: Dice, pair: Pair, kind: str, n: int) -> list[Pair]:
    """Pairs for a scene in which n things share the pair's shape, colour or both."""

    def fits(other: Pair) -> bool:
        return {"shape": other[0] == pair[0], "colour": other[1] == pair[1], "pair": other == pair}[kind]

    found = [pair] * min(n, 1)
    while len(found) < n:
        found.append(dice.other(fits))
    # with none to count, the first of the rest is a pair to be asked about, so that the split holds in the scene too
    for _ in range(dice.whole(0 if n else 1, 4 - n)):
        found.append(dice.other(lambda other: not fits(other), asked=not found))
    return found


def count(task: str, dice: Dice) -> Example:
    """how many red circles are there? zero to four; of all shapes, one to four."""
    kind = dice.choice(("all", "shape", "colour", "pair"))
    pair = dice.asked()
    if kind == "all":
        n = dice.whole(1, 4)
        pairs = [pair, *(dice.other(lambda _: True) for _ in range(n - 1))]
    else:
        n = dice.whole(0, 4)
        pairs = _counted(dice, pair, kind, n)
    nouns = {"all": "shape", "shape": pair[0], "colour": f"{pair[1]} thing", "pair": f"{pair[1]} {pair[0]}"}
    prompt = dice.choice(COUNT).format(what=plural(nouns[kind]))
    return _asked(task, prompt, dice.scene(pairs), NUMBERS[n])


def _about_one(dice: Dice, axis: int) -> Scene:
    """A scene whose first thing alone has its shape (axis 0) or its colour (axis 1)."""
    pair = dice.asked()
    rest = [dice.other(lambda other: other[axis] != pair[axis]) for _ in range(dice.whole(0, 3))]
    return dice.scene([pair, *rest])


def colour(task: str, dice: Dice) -> Example:
    """what colour is the star? there is one star."""
    scene = _about_one(dice, 0)
    thing = scene.things[0]
    return _asked(task, dice.choice(COLOUR).format(what=f"the {thing.shape}"), scene, thing.colour)


def shape(task: str, dice: Dice) -> Example:
    """what shape is the red thing? there is one red thing."""
    scene = _about_one(dice, 1)
    thing = scene.things[0]
    return _asked(task, dice.choice(SHAPE).format(what=f"the {thing.colour} thing"), scene, thing.shape)


def there(task: str, dice: Dice) -> Example:
    """is there a red circle? When there is none, half of the scenes hold its shape or its colour."""
    pair = dice.asked()
    yes = dice.coin()
    pairs = [pair] if yes else [dice.other(lambda other: other != pair, asked=True)]
    if not yes and dice.coin():
        pairs.append(dice.other(lambda other: (other[0] == pair[0]) != (other[1] == pair[1])))
    pairs += [dice.other(lambda other: other != pair) for _ in range(dice.whole(0, 4 - len(pairs)))]
    what = article(f"{pair[1]} {pair[0]}")
    return _asked(task, dice.choice(THERE).format(what=what), dice.scene(pairs), "yes" if yes else "no")


def where(task: str, dice: Dice) -> Example:
    """where is the red circle? the name of its cell."""
    scene = dice.scene(dice.pairs(dice.whole(1, 4)))
    thing = scene.things[0]
    return _asked(task, dice.choice(WHERE).format(what=dice.choice(names(thing, scene))), scene, thing.place)


def relation(task: str, dice: Dice) -> Example:
    """is the red circle left of the blue square? When not, it is on the other side."""
    name = dice.choice(RELATIONS)
    pairs = dice.mixed(dice.pairs(2))
    cells = list(dice.related_cells(name))
    if dice.coin():
        pairs.append(dice.other(lambda other: other not in pairs))
        cells.append(dice.choice([cell for cell in range(9) if cell not in cells]))
    scene = Scene(things=tuple(dice.thing(pair, cell) for pair, cell in zip(pairs, cells, strict=True)))
    a, b = (dice.choice(names(thing, scene)) for thing in scene.things[:2])
    yes = dice.coin()
    prompt = dice.choice(RELATION).format(a=a, b=b, relation=name if yes else OPPOSITE[name])
    return _asked(task, prompt, scene, "yes" if yes else "no")


def compare(task: str, dice: Dice) -> Example:
    """are there more circles than squares? or, a third of the time, which of two is larger."""
    return _larger(task, dice) if dice.whole(0, 2) == 0 else _more(task, dice)


def _more(task: str, dice: Dice) -> Example:
    """yes or no, each half of the time; when no, the two are as many or the other shape is ahead."""
    pair, yes = dice.asked(), dice.coin()
    rival = dice.choice([shape for shape in SHAPES if shape != pair[0]])
    more, fewer = dice.choice(AHEAD if yes else BEHIND)
    # the pair may stand on either side of the question, but it must be there
    first = dice.coin() if more and fewer else bool(more)
    ours, theirs = (more, fewer) if first else (fewer, more)
    pairs = [pair]
    pairs += [dice.other(lambda other: other[0] == pair[0]) for _ in range(ours - 1)]
    pairs += [dice.other(lambda other: other[0] == rival) for _ in range(theirs)]
    pairs += [dice.other(lambda other: other[0] not in (pair[0], rival)) for _ in range(dice.whole(0, 4 - len(pairs)))]
    a, b = (pair[0], rival) if first else (rival, pair[0])
    prompt = dice.choice(MORE).format(a=plural(a), b=plural(b))
    return _asked(task, prompt, dice.scene(pairs), "yes" if yes else "no")


def _larger(task: str, dice: Dice) -> Example:
    """The larger, or the smaller, of two things of different size."""
    pairs = dice.pairs(dice.whole(2, 3))
    sizes = [*dice.mixed(SIZES), dice.choice(SIZES)]
    cells = dice.cells(len(pairs))
    placed = zip(pairs, cells, sizes[: len(pairs)], strict=True)
    things = tuple(dice.thing(pair, cell, size=size) for pair, cell, size in placed)
    wordings, size = dice.choice(((LARGER, "large"), (SMALLER, "small")))
    named = dice.mixed([(f"the {thing.colour} {thing.shape}", thing.size) for thing in things[:2]])
    answer = next(words for words, thing_size in named if thing_size == size)
    prompt = dice.choice(wordings).format(a=named[0][0], b=named[1][0])
    return _asked(task, prompt, Scene(things=things), answer)
