"""GenEval's rules: whether an image is right, from what was detected in it. No model takes part here.

As in its evaluate_images.py (MIT), with its default thresholds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import Any

import numpy as np
from numpy.typing import NDArray

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MOST_OBJECTS = 16
# of the two objects' sizes together, that an offset must exceed
POSITION_THRESHOLD = 0.1
# of the direction from one to the other, along an axis
DIRECTION_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Detection:
    """An object in an image. box: (left, top, right, bottom) in pixels; mask: its pixels, bool [h, w]."""

    box: tuple[float, float, float, float]
    score: float
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)


# what is detected, by class
Detections = Mapping[str, Sequence[Detection]]
# the colour of each object of a class
NameColours = Callable[[str, Sequence[Detection]], Sequence[str]]


def keep_detections(detections: Detections, tag: str) -> dict[str, list[Detection]]:
    """Those of each class that count, the surest first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept = {
        name: sorted((one for one in some if one.score > threshold), key=lambda one: -one.score)[:MOST_OBJECTS]
        for name, some in detections.items()
    }
    return {name: some for name, some in kept.items() if some}


def check_image(detections: Detections, metadata: Mapping[str, Any], name_colours: NameColours) -> tuple[bool, str]:
    """Whether an image is right, and what is wrong of it.

    metadata: of the prompt: `tag`, what the image must `include`, and what it must `exclude`.
    """
    objects = keep_detections(detections, metadata["tag"])
    faults: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", []):
        found = objects.get(clause["class"], [])[: clause["count"]]
        fault = _clause_fault(clause, found, matched, name_colours)
        matched.append(None if fault else found)
        faults += [fault] if fault else []
    for clause in metadata.get("exclude", []):
        n = len(objects.get(clause["class"], []))
        if n >= clause["count"]:
            faults.append(f"expected {clause['class']}<{clause['count']}, found {n}")
    return not faults, "; ".join(faults)


def _clause_fault(
    clause: Mapping[str, Any],
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    name_colours: NameColours,
) -> str:
    """What is wrong of the objects found for a clause; nothing where it holds. matched: those of earlier clauses."""
    name = clause["class"]
    count = clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        colours = list(name_colours(name, found))
        if colours.count(clause["color"]) < count:
            return f"expected {clause['color']} {name}>={count}, found {', '.join(colours)}"
    if "position" in clause:
        relation, target = clause["position"]
        others = matched[target]
        if others is None:
            return f"no target for {name} to be {relation}"
        for one in found:
            for other in others:
                true = relative_position(one, other)
                if relation not in true:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(true)) or 'neither'} target"
    return ""


def relative_position(a: Detection, b: Detection) -> set[str]:
    """Where a is, seen from b: the offset of the centres less a tenth of both sizes, by the direction's components."""
    centres = [[(one.box[axis] + one.box[axis + 2]) / 2 for axis in (0, 1)] for one in (a, b)]
    sizes = [[abs(one.box[axis + 2] - one.box[axis]) for axis in (0, 1)] for one in (a, b)]
    offset = [centres[0][axis] - centres[1][axis] for axis in (0, 1)]
    revised = [
        max(abs(offset[axis]) - POSITION_THRESHOLD * (sizes[0][axis] + sizes[1][axis]), 0)
        * (1 if offset[axis] > 0 else -1)
        for axis in (0, 1)
    ]
    if max(map(abs, revised)) < 1e-3:
        return set()
    dx, dy = (one / hypot(*offset) for one in revised)
    held = {
        "left of": dx < -DIRECTION_THRESHOLD,
        "right of": dx > DIRECTION_THRESHOLD,
        "above": dy < -DIRECTION_THRESHOLD,
        "below": dy > DIRECTION_THRESHOLD,
    }
    return {name for name, holds in held.items() if holds}
