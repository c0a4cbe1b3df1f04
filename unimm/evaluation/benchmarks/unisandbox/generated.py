"""Items of UniSandBox's kinds made from a seed: for photographs, and for the little world of shapes.

Those of the little world are about pairs of shape and colour that no training image held, and their images can be judged
exactly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unimm.data.reasoning.arithmetic_text import evaluate_text
from unimm.data.reasoning.questions import (
    ArithmeticOptions,
    ReasoningQuestion,
    arithmetic_questions,
    mapping_questions,
)
from unimm.data.reasoning.rules import resolve_rules
from unimm.data.shapes import Example, ImageGoal, example
from unimm.data.shapes.language import article, plural
from unimm.data.shapes.mapping_pairs import mapping_pair
from unimm.evaluation.benchmarks.shapes import describe_goal
from unimm.evaluation.benchmarks.unisandbox.files import MATH

WORLDS = ("shapes", "photos")
# so many repetitions in a row, and there are no more questions
MOST_REPEATED = 2000


@dataclass(frozen=True, kw_only=True, eq=False)
class ShapesQuestion:
    """A question of the little world, with its example."""

    id: str
    side: str
    example: Example


@dataclass(frozen=True, kw_only=True, eq=False)
class AskedQuestion:
    """A question, with its example where it is of the little world."""

    question: ReasoningQuestion
    example: Example | None = None


def generated_questions(task: str, n: int, *, world: str, seed: int, split: str = "test") -> list[AskedQuestion]:
    """n questions of a level, or pairs of them, in one of WORLDS. split: of the little world's pairs of shape and
    colour."""
    if world == "photos":
        return [AskedQuestion(question=one) for one in photo_questions(task, n, seed=seed)]
    return [
        AskedQuestion(
            question=ReasoningQuestion(
                id=one.id, side=one.side, question=one.example.prompt, answer=describe_goal(one.example.goal)
            ),
            example=one.example,
        )
        for one in shapes_questions(task, n, seed=seed, split=split)
    ]


def photo_questions(task: str, n: int, *, seed: int) -> list[ReasoningQuestion]:
    """n questions, or pairs of them, about photographs, of a level's operations and answers."""
    level = int(task[-1])
    if task not in MATH:
        return mapping_questions(level, n, seed=seed)
    # the first level is of the four operations, and the last goes to five
    operations = ArithmeticOptions().operations if level > 1 else ("+", "-", "*", "/")
    options = ArithmeticOptions(operations=operations, counts=(1, 5) if level > 2 else (1, 4))
    return arithmetic_questions(level, n, seed=seed, options=options)


def shapes_questions(task: str, n: int, *, seed: int, split: str = "test") -> list[ShapesQuestion]:
    """n different questions, or pairs of them, of the little world. Raises ValueError where there are not so many."""
    found: list[Sequence[Example]] = []
    seen: set[str] = set()
    repeated = 0
    for some in _examples(task, seed=seed, split=split):
        if some[0].prompt in seen:
            repeated += 1
            if repeated > MOST_REPEATED:
                raise ValueError(
                    f"got n {n}: there are only some {len(found)} different questions of {task}; take fewer"
                )
            continue
        repeated = 0
        seen.update(one.prompt for one in some)
        for one in some:
            check_answer(task, one)
        found.append(some)
        if len(found) == n:
            break
    sides = "AB" if task not in MATH else ("",)
    return [
        ShapesQuestion(id=str(i), side=side, example=one)
        for i, some in enumerate(found, start=1)
        for side, one in zip(sides, some, strict=True)
    ]


def _examples(task: str, *, seed: int, split: str) -> Iterator[Sequence[Example]]:
    index = 0
    while True:
        if task in MATH:
            yield (example(f"reason.{task}", index, seed=seed, split=split),)
        else:
            yield mapping_pair(int(task[-1]), index, seed=seed, split=split)
        index += 1


def check_answer(task: str, one: Example) -> None:
    """Find the answer of an example again, from its prompt alone."""
    goal = one.goal
    assert isinstance(goal, ImageGoal)
    first = goal.wants[0]
    name = f"{first.colour} {first.shape}"
    if task in MATH:
        before, _, after = one.prompt.partition(plural(name))
        assert len(before) < len(one.prompt) and evaluate_text(f"{before} {after}") == len(goal.wants), one.prompt
    else:
        assert resolve_rules(one.prompt) == article(name) and len(goal.wants) == 1, one.prompt
