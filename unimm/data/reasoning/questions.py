"""Questions about photographs: how many of an object by arithmetic, and which object by a chain of rules.

The same arguments give the same questions on every machine, and the first of n are those of every larger n. No question
comes twice, and every answer is found again from the text of its question.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from unimm.data.reasoning.arithmetic_text import evaluate_text
from unimm.data.reasoning.expressions import (
    OPERATIONS,
    Expression,
    check_operations,
    format_expression,
    format_steps,
    sample_expression,
)
from unimm.data.reasoning.objects import OBJECTS, counted, noun_article, plural_noun
from unimm.data.reasoning.rules import resolve_rules
from unimm.data.seeded_rng import SeededRng

ARITHMETIC_WORDINGS = (
    "Draw exactly as many {objects} as {sum} gives.",
    "A photo of {objects}; their number is {sum}.",
    "Show {objects}. How many of them? {sum}.",
    "Paint some {objects}, and let their number be {sum}.",
)
STEP_WORDINGS = ("Draw {objects}. For their number, {steps}.", "Work out how many {objects} to show: {steps}.")
# of rules: what a symbol stands for
VERBS = ("means", "stands for", "refers to", "represents", "maps to")
MAPPING_WORDINGS = (
    "Please draw what '{symbol}' finally stands for.",
    "Draw only the {kind} that '{symbol}' leads to.",
    "Show the {kind} behind '{symbol}'.",
)
SYMBOLS = (*"ABCDEFGHJKLMNPQRSTUVWXYZ", *"123456789", *"#$%&@*+~?")
Made = TypeVar("Made", bound=tuple[str, ...])
# so many repetitions in a row, and there are no more questions of that sort
MOST_REPEATED = 1000


@dataclass(frozen=True, kw_only=True)
class ReasoningQuestion:
    """A question and its answer: "2 cups", or "cup".

    side: "A" or "B" for one of a pair, whose questions share their rules and differ in their answers; "" for one alone.
    """

    id: str
    question: str
    answer: str
    side: str = ""


@dataclass(frozen=True, kw_only=True)
class ArithmeticOptions:
    """What arithmetic questions are made of. counts: the least and the greatest answer."""

    operations: tuple[str, ...] = OPERATIONS
    counts: tuple[int, int] = (1, 4)
    objects: tuple[str, ...] = tuple(noun for nouns in OBJECTS.values() for noun in nouns)
    wordings: tuple[str, ...] = (*ARITHMETIC_WORDINGS, *STEP_WORDINGS)

    def __post_init__(self) -> None:
        check_operations(self.operations)
        low, high = self.counts
        if not 1 <= low <= high <= 9:
            raise ValueError(f"got counts {low} to {high}: expected 1 to 9, the least first")
        if not self.objects or not self.wordings:
            raise ValueError("got no objects or no wordings: expected at least one of each")


def arithmetic_questions(
    n_operations: int, n: int, *, seed: int = 0, options: ArithmeticOptions | None = None
) -> list[ReasoningQuestion]:
    """n questions with so many operations each. Raises ValueError where there are not so many different ones."""
    options = options or ArithmeticOptions()
    if n_operations < 1:
        raise ValueError(f"got {n_operations} operations: expected at least 1")
    made = _distinct(n, f"arithmetic of {n_operations}", seed, lambda rng: _arithmetic(rng, n_operations, options))
    return [
        ReasoningQuestion(id=str(i), question=question, answer=answer) for i, (question, answer) in enumerate(made, 1)
    ]


def _arithmetic(rng: SeededRng, n_operations: int, options: ArithmeticOptions) -> tuple[str, str]:
    count = rng.integer(*options.counts)
    expression = sample_expression(rng, count, n_operations, options.operations)
    noun = rng.choice(options.objects)
    question = _word_arithmetic(rng, expression, noun, options.wordings)
    value = evaluate_text(question)
    assert value == count, f"{question} was made for {count} and gives {value}"
    return question, counted(count, noun)


def _word_arithmetic(rng: SeededRng, expression: Expression, noun: str, wordings: Sequence[str]) -> str:
    """In a wording that the expression can be put in: not every one goes step by step."""
    steps = format_steps(expression)
    fitting = [one for one in wordings if "{steps}" not in one or steps is not None]
    if not fitting:
        raise ValueError("got wordings in steps alone: expected one with {sum}, for arithmetic that has no steps")
    wording = rng.choice(fitting)
    text = wording.format(objects=plural_noun(noun), sum=format_expression(expression), steps=steps)
    # a sentence may begin with its steps
    return text[0].upper() + text[1:]


# ---- mapping


@dataclass(frozen=True, kw_only=True)
class MappingOptions:
    """What mapping questions are made of. spare: rules that lead nowhere, beside those of the two chains."""

    objects: Mapping[str, Sequence[str]]
    wordings: tuple[str, ...] = MAPPING_WORDINGS
    verbs: tuple[str, ...] = VERBS
    spare: int = 0

    def __post_init__(self) -> None:
        if any(len(nouns) < 2 for nouns in self.objects.values()) or not self.objects:
            raise ValueError(
                "got a kind with fewer than two objects: expected two or more of each, for the two questions"
            )
        if unknown := [verb for verb in self.verbs if verb not in VERBS]:
            raise ValueError(f"got the verb {unknown[0]!r}: expected some of {', '.join(VERBS)}")


def mapping_questions(
    depth: int, n: int, *, seed: int = 0, options: MappingOptions | None = None
) -> list[ReasoningQuestion]:
    """n pairs of questions, A and B, each about the end of a chain of so many rules."""
    options = options or MappingOptions(objects=OBJECTS)
    most = (len(SYMBOLS) - options.spare) // 2
    if not 1 <= depth <= most:
        raise ValueError(f"got depth {depth}: expected 1 to {most}, for the symbols are no more")
    made = _distinct(n, f"mapping of depth {depth}", seed, lambda rng: _mapping(rng, depth, options))
    return [
        ReasoningQuestion(id=str(i), question=question, answer=answer, side=side)
        for i, pair in enumerate(made, 1)
        for side, (question, answer) in zip("AB", (pair[:2], pair[2:]), strict=True)
    ]


def _mapping(rng: SeededRng, depth: int, options: MappingOptions) -> tuple[str, str, str, str]:
    """The two questions, each with its answer behind it."""
    symbols = rng.shuffled(SYMBOLS)
    kind = rng.choice(tuple(options.objects))
    nouns = rng.shuffled(options.objects[kind])[:2]
    verb = rng.choice(options.verbs)
    starts = [symbols[:depth], symbols[depth : 2 * depth]]
    rules = [
        f"'{a}' {verb} {b}"
        for names, noun in zip(starts, nouns, strict=True)
        for a, b in zip(names, [*(f"'{one}'" for one in names[1:]), noun_article(noun)], strict=True)
    ]
    spare = symbols[2 * depth : 2 * depth + options.spare]
    # a spare rule points into a chain, and nothing points to it
    rules += [f"'{symbol}' {verb} '{rng.choice(symbols[: 2 * depth])}'" for symbol in spare]
    text = " ".join(f"Rule {i}: {rule}." for i, rule in enumerate(rng.shuffled(rules), start=1))
    wording = rng.choice(options.wordings)
    made: list[str] = []
    for names, noun in zip(starts, nouns, strict=True):
        question = f"{text} {wording.format(symbol=names[0], kind=kind)}"
        found = resolve_rules(question)
        assert found == noun_article(noun), f"{question} was made for {noun} and gives {found}"
        made += [question, noun]
    return made[0], made[1], made[2], made[3]


def _distinct(n: int, what: str, seed: int, make: Callable[[SeededRng], Made]) -> list[Made]:
    """n different ones, in an order that does not depend on n."""
    if n < 1:
        raise ValueError(f"got n {n}: expected at least 1")
    found: dict[Made, None] = {}
    tried = repeated = 0
    while len(found) < n:
        one = make(SeededRng(f"reasoning/{seed}/{what}/{tried}"))
        tried += 1
        repeated = repeated + 1 if one in found else 0
        found[one] = None
        if repeated > MOST_REPEATED:
            raise ValueError(f"got n {n}: there are only some {len(found)} different questions of {what}; take fewer")
    return list(found)
