"""The labels of UniSandBox's files: as they are, or with the wrong ones put right.

A label of arithmetic is right if it is what its question's text evaluates to. Those that are not, in the released files,
are listed here, and what is evaluated is held against the list: a difference that is not on it is an error, since either
the file is another one, or the question was misread.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from unimm.data.reasoning.arithmetic_text import evaluate_text
from unimm.data.reasoning.objects import counted, singular_noun
from unimm.data.reasoning.questions import ReasoningQuestion
from unimm.evaluation.benchmarks.unisandbox.files import MAPPING, MATH

# id -> the label in the released file (commit c5f0af82) and the value of its arithmetic; None where that is no number
# of things
WRONG_LABELS: dict[str, dict[str, tuple[int, int | None]]] = {
    "math1": {},
    "math2": {
        "9": (4, 2),
        "10": (1, None),
        "44": (3, 2),
        "51": (4, 5),
        "55": (3, 4),
        "64": (3, 2),
        "65": (2, None),
        "69": (4, 6),
        "70": (3, None),
        "75": (3, 4),
        "80": (4, 5),
        "91": (3, 1),
    },
    "math3": {
        "1": (1, None),
        "11": (4, 3),
        "14": (3, 6),
        "19": (3, 1),
        "22": (3, 2),
        "24": (3, 6),
        "26": (3, 5),
        "30": (3, 2),
        "31": (3, 4),
        "32": (5, 4),
        "36": (2, 4),
        "45": (3, 1),
        "46": (4, 3),
        "54": (2, None),
        "64": (4, 6),
        "67": (4, 3),
        "71": (5, 4),
        "83": (4, 2),
        "86": (5, 3),
        "91": (3, None),
        "92": (1, None),
        "96": (2, 4),
    },
}
# questions of the released files that name nothing to draw; the last is not determined either
NAMELESS = {"math3": ("76", "79", "94")}
# pairs whose rules lead to no object for one of the two questions, read by hand
UNDETERMINED = {"mapping2": ("12", "20"), "mapping3": ("11", "12", "13", "18")}
_COUNT = re.compile(r"(\d+)\s+(.+?)\.?")


def corrected(task: str, questions: Sequence[ReasoningQuestion]) -> tuple[list[ReasoningQuestion], dict[str, str]]:
    """Questions of a task with right labels, and those that are left out for want of one: id -> why.

    Raises ValueError for a label that is neither right nor known to be wrong.
    """
    if task in MATH:
        return _corrected_counts(task, questions)
    undetermined = UNDETERMINED.get(task, ()) if task in MAPPING else ()
    left_out = {one.id: "the rules lead to no object" for one in questions if one.id in undetermined}
    return [one for one in questions if one.id not in left_out], left_out


def _corrected_counts(
    task: str, questions: Sequence[ReasoningQuestion]
) -> tuple[list[ReasoningQuestion], dict[str, str]]:
    kept = []
    left_out = {}
    for one in questions:
        if one.id in NAMELESS.get(task, ()):
            left_out[one.id] = "the question names no object"
            continue
        gold, noun = split_answer(one.answer)
        count = right_count(one.question)
        if count != gold and WRONG_LABELS[task].get(one.id) != (gold, count):
            raise ValueError(
                f"the label of {task}, id {one.id}, is {gold}, its question gives {count}, and it is not known to be "
                "wrong: is this another version of the file? Use --labels official"
            )
        if count is None:
            left_out[one.id] = "the arithmetic gives no number of things"
        else:
            right = one.answer if count == gold else counted(count, singular_noun(noun) if gold > 1 else noun)
            kept.append(replace(one, answer=right))
    return kept, left_out


def right_count(question: str) -> int | None:
    """What a question's arithmetic gives; None where that is no whole number of 1 or more."""
    value = evaluate_text(question)
    if value is None or value.denominator != 1 or value < 1:
        return None
    return int(value)


def split_answer(answer: str) -> tuple[int, str]:
    """The number and the noun of "2 cups." Raises ValueError for another form."""
    match = _COUNT.fullmatch(answer.strip())
    if match is None:
        raise ValueError(f"got the answer {answer!r}: expected a number and what is counted, as in 2 cups")
    return int(match[1]), match[2]
