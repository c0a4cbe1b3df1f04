"""The shapes world: a synthetic data set that is small enough to learn in an hour and can be scored exactly.

Scenes have one to four objects (six shapes, eight colours, two sizes) in the cells of a 3x3 grid, 64x64 pixels.
`render` makes the image of a scene, `parse_scene` finds the objects in an image, `example` makes prompts with their
images, answers and targets for every task of `TASKS`, and `judge` scores an output. Six (shape, colour) pairs,
`HELD_OUT`, never occur in the train split, and every example of the test split is about one of them.
"""

from unimm.data.shapes.goal import AnswerGoal, CaptionGoal, Example, Goal, ImageGoal, WantedObject
from unimm.data.shapes.scene_parser import UNCLEAR, ParsedObject, parse_scene
from unimm.data.shapes.scoring import judge, meets_goal
from unimm.data.shapes.tasks import SPLITS, TASKS, example, tokenizer_corpus
from unimm.data.shapes.world import (
    COLOURS,
    HELD_OUT,
    PALETTE,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    place_of,
    related,
    render,
)

__all__ = [
    "COLOURS",
    "HELD_OUT",
    "PALETTE",
    "PLACES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "TASKS",
    "UNCLEAR",
    "AnswerGoal",
    "CaptionGoal",
    "Example",
    "Goal",
    "ImageGoal",
    "ParsedObject",
    "Scene",
    "Thing",
    "WantedObject",
    "example",
    "judge",
    "meets_goal",
    "parse_scene",
    "place_of",
    "related",
    "render",
    "tokenizer_corpus",
]
