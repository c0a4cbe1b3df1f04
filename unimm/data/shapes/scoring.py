"""Says whether an output is what an example asked for."""

from collections.abc import Sequence
from itertools import permutations

from unimm.data.shapes.goal import Drawing, Example, Listing, Want
from unimm.data.shapes.scene_parser import Seen, read
from unimm.data.shapes.world import Picture, place_of, related

# an object that should stay may be read this far from its centre along each axis, in pixels
SLACK = 4


def judge(example: Example, output: str | Picture) -> bool:
    """Whether the output, text or a uint8 picture [64, 64, 3], is right for the example."""
    goal = example.goal
    if isinstance(goal, Drawing):
        return meets(read(_picture(example.task, output)), goal)
    if not isinstance(output, str):
        raise ValueError(f"got a {type(output).__name__} for {example.task}, expected str; pass the text that was said")
    if isinstance(goal, Listing):
        return _phrases(output) == sorted(goal.phrases)
    return _plain(output) == _plain(goal.text)


def meets(seen: Sequence[Seen], goal: Drawing) -> bool:
    """Whether the objects are exactly those wanted, in the relations wanted."""
    if len(seen) != len(goal.wants):
        return False
    return any(_fits(order, goal) for order in permutations(seen))


def _fits(order: Sequence[Seen], goal: Drawing) -> bool:
    """Whether each object, in this order, is what is wanted."""
    if not all(_is(one, want) for one, want in zip(order, goal.wants, strict=True)):
        return False
    centres = [(one.x, one.y) for one in order]
    return all(related(centres[a], relation, centres[b]) for a, relation, b in goal.relations)


def _is(one: Seen, want: Want) -> bool:
    """Whether the object has the attributes wanted."""
    return (
        (one.shape, one.colour) == (want.shape, want.colour)
        and want.size in (None, one.size)
        and want.place in (None, place_of(one.x, one.y))
        and (want.at is None or max(abs(one.x - want.at[0]), abs(one.y - want.at[1])) <= SLACK)
    )


def _picture(task: str, output: str | Picture) -> Picture:
    """The output if it is no text; read checks the rest."""
    if isinstance(output, str):
        raise ValueError(f"got text for {task}, expected a picture, uint8 [64, 64, 3]; pass the drawn pixels")
    return output


def _plain(text: str) -> str:
    """The text without case, spare spaces and a full stop at its end."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def _phrases(text: str) -> list[str]:
    """The phrases of a caption in a fixed order."""
    return sorted(part.strip() for part in _plain(text).replace(" and ", ", ").split(", "))
