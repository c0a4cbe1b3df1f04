"""Whether an output reaches the goal of its example."""

from collections.abc import Sequence
from itertools import permutations

from unimm.data.shapes.goal import CaptionGoal, Example, ImageGoal, WantedObject
from unimm.data.shapes.scene_parser import ParsedObject, parse_scene
from unimm.data.shapes.world import ImageArray, place_of, related

# an object that should stay may be found this far from its centre along each axis, in pixels
POSITION_TOLERANCE = 4


def judge(example: Example, output: str | ImageArray) -> bool:
    """Whether the output, text or an image, uint8 [64, 64, 3], is right.

    Raises ValueError for text where an image is expected, and the other way round.
    """
    goal = example.goal
    if isinstance(goal, ImageGoal):
        return meets_goal(parse_scene(_image_output(example.task, output)), goal)
    if not isinstance(output, str):
        raise ValueError(f"got a {type(output).__name__} for {example.task}, expected str: pass the generated text")
    if isinstance(goal, CaptionGoal):
        return _sorted_phrases(output) == sorted(goal.phrases)
    return _normalize(output) == _normalize(goal.text)


def meets_goal(objects: Sequence[ParsedObject], goal: ImageGoal) -> bool:
    """Whether the objects are exactly those of the goal, in its relations."""
    if len(objects) != len(goal.wants):
        return False
    return any(_matches_in_order(order, goal) for order in permutations(objects))


def _matches_in_order(order: Sequence[ParsedObject], goal: ImageGoal) -> bool:
    """Whether each object, in this order, matches the goal's."""
    if not all(_matches(one, want) for one, want in zip(order, goal.wants, strict=True)):
        return False
    centres = [(one.x, one.y) for one in order]
    return all(related(centres[a], relation, centres[b]) for a, relation, b in goal.relations)


def _matches(one: ParsedObject, want: WantedObject) -> bool:
    """Whether the object has the attributes of the goal's."""
    return (
        (one.shape, one.colour) == (want.shape, want.colour)
        and want.size in (None, one.size)
        and want.place in (None, place_of(one.x, one.y))
        and (
            want.position is None
            or max(abs(one.x - want.position[0]), abs(one.y - want.position[1])) <= POSITION_TOLERANCE
        )
    )


def _image_output(task: str, output: str | ImageArray) -> ImageArray:
    """The output if it is no text; `parse_scene` checks the rest."""
    if isinstance(output, str):
        raise ValueError(f"got text for {task}, expected an image, uint8 [64, 64, 3]: pass its pixels")
    return output


def _normalize(text: str) -> str:
    """The text in lower case, without spare spaces and a full stop at its end."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def _sorted_phrases(text: str) -> list[str]:
    """The phrases of a caption in a fixed order."""
    return sorted(part.strip() for part in _normalize(text).replace(" and ", ", ").split(", "))
