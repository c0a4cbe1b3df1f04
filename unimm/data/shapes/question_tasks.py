"""Tasks that ask about an image; most docstrings begin with a question or an answer."""

from unimm.data.shapes.goal import AnswerGoal, CaptionGoal, Example, Goal
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
    describe,
    join_phrases,
    plural,
    referring_expressions,
)
from unimm.data.shapes.rng import ExampleRng
from unimm.data.shapes.world import OPPOSITE, RELATIONS, SHAPES, SIZES, Scene, ShapeColour, render

# how many of the first and of the second shape a question compares
MORE_COUNTS = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1))
NOT_MORE_COUNTS = ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 2))


def _question_example(task: str, prompt: str, scene: Scene, answer: str, goal: Goal | None = None) -> Example:
    """An example whose goal, unless given, is the answer."""
    goal = goal or AnswerGoal(text=answer)
    return Example(task=task, prompt=prompt, goal=goal, images=(render(scene),), answer=answer, source_scene=scene)


def describe_objects(task: str, rng: ExampleRng) -> Example:
    """a red circle, a blue star and a green cross, in reading order."""
    scene = rng.scene(rng.distinct_pairs(rng.integer(1, 4)))
    phrases = [describe(thing) for thing in scene.reading_order()]
    return _question_example(
        task, rng.choice(CAPTION), scene, join_phrases(phrases), CaptionGoal(phrases=tuple(phrases))
    )


def describe_places(task: str, rng: ExampleRng) -> Example:
    """a large red circle at the top left and a small blue star in the centre."""
    scene = rng.scene(rng.distinct_pairs(rng.integer(1, 4)))
    phrases = [describe(thing, size=True, place=True) for thing in scene.reading_order()]
    return _question_example(
        task, rng.choice(CAPTION_FULL), scene, join_phrases(phrases), CaptionGoal(phrases=tuple(phrases))
    )


def _pairs_to_count(rng: ExampleRng, pair: ShapeColour, kind: str, n: int) -> list[ShapeColour]:
    """Pairs for a scene in which n things share the pair's shape, colour or both."""

    def fits(other: ShapeColour) -> bool:
        return {"shape": other[0] == pair[0], "colour": other[1] == pair[1], "pair": other == pair}[kind]

    found = [pair] * min(n, 1)
    while len(found) < n:
        found.append(rng.other_pair(fits))
    # with none to count, the first of the rest is a subject, so that the split holds in the scene, too
    for _ in range(rng.integer(0 if n else 1, 4 - n)):
        found.append(rng.other_pair(lambda other: not fits(other), subject=not found))
    return found


def answer_count(task: str, rng: ExampleRng) -> Example:
    """how many red circles are there? Zero to four; of all shapes, one to four."""
    kind = rng.choice(("all", "shape", "colour", "pair"))
    pair = rng.subject()
    if kind == "all":
        n = rng.integer(1, 4)
        pairs = [pair, *(rng.other_pair(lambda _: True) for _ in range(n - 1))]
    else:
        n = rng.integer(0, 4)
        pairs = _pairs_to_count(rng, pair, kind, n)
    nouns = {"all": "shape", "shape": pair[0], "colour": f"{pair[1]} thing", "pair": f"{pair[1]} {pair[0]}"}
    prompt = rng.choice(COUNT).format(what=plural(nouns[kind]))
    return _question_example(task, prompt, rng.scene(pairs), NUMBERS[n])


def _scene_with_unique(rng: ExampleRng, axis: int) -> Scene:
    """A scene whose first thing alone has its shape (axis 0) or its colour (axis 1)."""
    pair = rng.subject()
    rest = [rng.other_pair(lambda other: other[axis] != pair[axis]) for _ in range(rng.integer(0, 3))]
    return rng.scene([pair, *rest])


def answer_colour(task: str, rng: ExampleRng) -> Example:
    """what colour is the star? There is one star."""
    scene = _scene_with_unique(rng, 0)
    thing = scene.things[0]
    return _question_example(task, rng.choice(COLOUR).format(what=f"the {thing.shape}"), scene, thing.colour)


def answer_shape(task: str, rng: ExampleRng) -> Example:
    """what shape is the red thing? There is one red thing."""
    scene = _scene_with_unique(rng, 1)
    thing = scene.things[0]
    return _question_example(task, rng.choice(SHAPE).format(what=f"the {thing.colour} thing"), scene, thing.shape)


def answer_there(task: str, rng: ExampleRng) -> Example:
    """is there a red circle? When there is none, half of the scenes hold its shape or its colour."""
    pair = rng.subject()
    yes = rng.coin()
    pairs = [pair] if yes else [rng.other_pair(lambda other: other != pair, subject=True)]
    if not yes and rng.coin():
        pairs.append(rng.other_pair(lambda other: (other[0] == pair[0]) != (other[1] == pair[1])))
    pairs += [rng.other_pair(lambda other: other != pair) for _ in range(rng.integer(0, 4 - len(pairs)))]
    what = article(f"{pair[1]} {pair[0]}")
    return _question_example(task, rng.choice(THERE).format(what=what), rng.scene(pairs), "yes" if yes else "no")


def answer_where(task: str, rng: ExampleRng) -> Example:
    """where is the red circle? The name of its cell."""
    scene = rng.scene(rng.distinct_pairs(rng.integer(1, 4)))
    thing = scene.things[0]
    return _question_example(
        task, rng.choice(WHERE).format(what=rng.choice(referring_expressions(thing, scene))), scene, thing.place
    )


def answer_relation(task: str, rng: ExampleRng) -> Example:
    """is the red circle left of the blue square? When not, it is on the other side."""
    name = rng.choice(RELATIONS)
    pairs = rng.shuffled(rng.distinct_pairs(2))
    cells = list(rng.related_cells(name))
    if rng.coin():
        pairs.append(rng.other_pair(lambda other: other not in pairs))
        cells.append(rng.choice([cell for cell in range(9) if cell not in cells]))
    scene = Scene(things=tuple(rng.thing(pair, cell) for pair, cell in zip(pairs, cells, strict=True)))
    a, b = (rng.choice(referring_expressions(thing, scene)) for thing in scene.things[:2])
    yes = rng.coin()
    prompt = rng.choice(RELATION).format(a=a, b=b, relation=name if yes else OPPOSITE[name])
    return _question_example(task, prompt, scene, "yes" if yes else "no")


def answer_compare(task: str, rng: ExampleRng) -> Example:
    """are there more circles than squares? Or, a third of the time, which of two things is larger."""
    return _compare_sizes(task, rng) if rng.integer(0, 2) == 0 else _compare_counts(task, rng)


def _compare_counts(task: str, rng: ExampleRng) -> Example:
    """yes or no, each half of the time; when no, there are as many of the other shape, or more."""
    pair = rng.subject()
    yes = rng.coin()
    rival = rng.choice([shape for shape in SHAPES if shape != pair[0]])
    more, fewer = rng.choice(MORE_COUNTS if yes else NOT_MORE_COUNTS)
    # the pair may stand on either side of the question, but it must be there
    first = rng.coin() if more and fewer else bool(more)
    ours, theirs = (more, fewer) if first else (fewer, more)
    pairs = [pair]
    pairs += [rng.other_pair(lambda other: other[0] == pair[0]) for _ in range(ours - 1)]
    pairs += [rng.other_pair(lambda other: other[0] == rival) for _ in range(theirs)]
    pairs += [
        rng.other_pair(lambda other: other[0] not in (pair[0], rival)) for _ in range(rng.integer(0, 4 - len(pairs)))
    ]
    a, b = (pair[0], rival) if first else (rival, pair[0])
    prompt = rng.choice(MORE).format(a=plural(a), b=plural(b))
    return _question_example(task, prompt, rng.scene(pairs), "yes" if yes else "no")


def _compare_sizes(task: str, rng: ExampleRng) -> Example:
    """The larger, or the smaller, of two things of different size."""
    pairs = rng.distinct_pairs(rng.integer(2, 3))
    sizes = [*rng.shuffled(SIZES), rng.choice(SIZES)]
    cells = rng.distinct_cells(len(pairs))
    placed = zip(pairs, cells, sizes[: len(pairs)], strict=True)
    things = tuple(rng.thing(pair, cell, size=size) for pair, cell, size in placed)
    wordings, size = rng.choice(((LARGER, "large"), (SMALLER, "small")))
    named = rng.shuffled([(f"the {thing.colour} {thing.shape}", thing.size) for thing in things[:2]])
    answer = next(words for words, thing_size in named if thing_size == size)
    prompt = rng.choice(wordings).format(a=named[0][0], b=named[1][0])
    return _question_example(task, prompt, Scene(things=things), answer)
