"""Questions that need reasoning: every answer worked out a third time here, no question twice, the same from a seed."""

import re
from fractions import Fraction
from math import isqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimm.data.reasoning.arithmetic_text import evaluate_text
from unimm.data.reasoning.expressions import (
    OPERATIONS,
    Number,
    Operation,
    Root,
    count_operations,
    format_expression,
    format_steps,
    sample_expression,
)
from unimm.data.reasoning.objects import IRREGULAR, OBJECTS, counted, plural_noun, singular_noun
from unimm.data.reasoning.questions import (
    ArithmeticOptions,
    MappingOptions,
    arithmetic_questions,
    mapping_questions,
)
from unimm.data.reasoning.rules import resolve_rules
from unimm.data.seeded_rng import SeededRng
from unimm.data.shapes import HELD_OUT, ImageGoal, judge
from unimm.data.shapes.mapping_pairs import mapping_pair


def python_value(text: str) -> Fraction:
    """By Python's own arithmetic."""
    code = re.sub(r"\d+", lambda number: f"Fraction({number[0]})", text.replace("^", "**"))
    return eval(code.replace("\u221a", "root"), {"Fraction": Fraction, "root": Square()})


class Square:
    """`root` before a number or parentheses: Python needs a call there, so that only roots in parentheses are tried."""

    def __call__(self, x: Fraction) -> Fraction:
        return Fraction(isqrt(int(x)))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 6))
def test_expressions_give_what_they_were_made_for(seed, value, n):
    expression = sample_expression(SeededRng(str(seed)), value, n)
    assert count_operations(expression) == n
    text = format_expression(expression)
    assert evaluate_text(text) == value
    # a root of a number alone gets parentheses for Python
    assert python_value(re.sub(r"\u221a(\d+)", "\u221a(\\1)", text)) == value
    steps = format_steps(expression)
    assert steps is None or evaluate_text(steps) == value


@pytest.mark.parametrize("sign", OPERATIONS)
def test_each_operation_is_made(sign):
    value = 4 if sign in ("*", "^") else 2
    expression = sample_expression(SeededRng("0"), value, 1, (sign,))
    assert isinstance(expression, Root) if sign == "root" else expression.sign == sign


def test_parentheses_are_put_where_they_are_needed():
    one, two, nine = Number(value=1), Number(value=2), Number(value=9)
    difference = Operation(sign="-", left=nine, right=one)
    assert format_expression(Operation(sign="-", left=difference, right=two)) == "9 - 1 - 2"
    assert (
        format_expression(Operation(sign="-", left=nine, right=Operation(sign="-", left=two, right=one)))
        == "9 - (2 - 1)"
    )
    assert format_expression(Operation(sign="*", left=difference, right=two)) == "(9 - 1) * 2"
    assert format_expression(Operation(sign="^", left=Root(of=nine), right=two)) == "(\u221a9)^2"
    assert format_expression(Root(of=Operation(sign="^", left=two, right=two))) == "\u221a(2^2)"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("as many apples as the result of \u221a16 - 2.", 2),
        ("the same quantity of kittens as the square root of 9 plus 1 minus 2.", 2),
        ("(5^0) * 3 + 1", 4),
        ("8 % 3 + 3 - 1", 4),
        ("(7 % 5) + 2 * 1", 4),
        ("2\u00b2 + 1", 5),
        ("4 \u00d7 6 \u00f7 8 \u2212 1", 2),
        ("three things: 2 squared times 3 modulo 5", 2),
        ("the square root of 16 minus 3, then add 2.", 3),
        ("as 11 / 4 equals then rounded down.", 2),
        ("\u221a(M\u00b2 + 9) where M = 4", 5),
        ("start with 16, take the square root, subtract 3, multiply by 6, take the rest modulo 4", 2),
        ("start with 3, square it, divide by 9, add 1", 2),
        ("25 / \u221a9", Fraction(25, 3)),
        ("2^3^1", 8),
        ("3 + 2 - \u221a25", 0),
        ("\u221a10", None),
        ("\u221a(2 - 3)", None),
        ("3 / (2 - 2)", None),
        ("2^(1 / 2)", None),
    ],
)
def test_arithmetic_in_texts(text, value):
    assert evaluate_text(text) == value


@pytest.mark.parametrize("text", ["as many apples as pears", "(3 + 2", "3 +", "7 apples and pears", "2 $ 3", "3 4"])
def test_arithmetic_that_is_not_understood(text):
    with pytest.raises(ValueError, match=r"found no arithmetic|expected|no closing"):
        evaluate_text(text)


# ---- questions


@pytest.mark.parametrize("n_operations", [1, 2, 3, 5])
def test_arithmetic_questions(n_operations):
    made = arithmetic_questions(n_operations, 120, seed=7)
    assert len({one.question for one in made}) == 120 and [one.id for one in made[:2]] == ["1", "2"]
    assert {one.answer.split()[0] for one in made} == {"1", "2", "3", "4"}
    for one in made:
        number, noun = one.answer.split(" ", 1)
        assert evaluate_text(one.question) == int(number)
        assert plural_noun(singular_noun(noun) if int(number) > 1 else noun) in one.question.lower()


def test_questions_depend_on_the_seed_alone():
    assert arithmetic_questions(2, 20, seed=1) == arithmetic_questions(2, 50, seed=1)[:20]
    assert arithmetic_questions(2, 20, seed=1) != arithmetic_questions(2, 20, seed=2)
    assert mapping_questions(2, 5, seed=1) == mapping_questions(2, 9, seed=1)[:10]


def test_what_arithmetic_is_made_of():
    options = ArithmeticOptions(
        operations=("+", "-"), counts=(5, 6), objects=("teapot",), wordings=("{objects}: {sum}",)
    )
    made = arithmetic_questions(3, 30, options=options)
    assert all(re.fullmatch(r"Teapots: [-+() 0-9]+", one.question) for one in made)
    assert {one.answer for one in made} == {"5 teapots", "6 teapots"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: arithmetic_questions(0, 3), "got 0 operations"),
        (lambda: arithmetic_questions(1, 0), "got n 0"),
        (lambda: ArithmeticOptions(operations=("plus",)), "operation 'plus'"),
        (lambda: ArithmeticOptions(operations=()), "no operations"),
        (lambda: ArithmeticOptions(counts=(0, 3)), "counts 0 to 3"),
        (lambda: ArithmeticOptions(objects=()), "no objects"),
        (lambda: arithmetic_questions(1, 5, options=ArithmeticOptions(operations=("+",))), "no operation of . gives 1"),
        (
            lambda: arithmetic_questions(
                1, 10**4, options=ArithmeticOptions(operations=("-",), objects=("cup",), wordings=("{objects} {sum}",))
            ),
            "only some 36 different",
        ),
        (lambda: mapping_questions(30, 1), "got depth 30: expected 1 to"),
        (lambda: MappingOptions(objects={"fruit": ("apple",)}), "fewer than two"),
        (lambda: MappingOptions(objects=OBJECTS, verbs=("eats",)), "the verb 'eats'"),
    ],
)
def test_questions_that_cannot_be_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("depth", "spare"), [(1, 0), (2, 0), (3, 0), (3, 2), (8, 1)])
def test_mapping_questions(depth, spare):
    made = mapping_questions(depth, 40, options=MappingOptions(objects=OBJECTS, spare=spare))
    assert len(made) == 80 and len({one.question for one in made}) == 80
    for a, b in zip(made[::2], made[1::2], strict=True):
        assert (a.id, a.side, b.id, b.side) == (a.id, "A", a.id, "B") and a.answer != b.answer
        assert a.question.count("Rule ") == 2 * depth + spare
        # they differ in the symbol that is asked for alone
        assert a.question.rsplit("'", 2)[0] == b.question.rsplit("'", 2)[0]
        for one in (a, b):
            assert resolve_rules(one.question).split(" ", 1)[1] == one.answer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("rule 1: A means B. rule 2: B means a red circle. draw A", "a red circle"),
        ("Rule 1: '7' stands for a cup. Rule 2: '#' maps to '7'. Show the thing behind '#'.", "a cup"),
        ("Rule 1: '?' is mapped to an orange. Draw '?'!", "an orange"),
    ],
)
def test_rules(text, found):
    assert resolve_rules(text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draw A", "got 0 rules"),
        ("rule 1: A means a cup. draw B", "0 of their symbols"),
        ("rule 1: A means a cup. rule 2: A means a fork. draw A", "two rules for A"),
        ("rule 1: A means B. draw A", "ends in B, which no rule explains"),
        ("rule 1: A means B. rule 2: B means A. draw A", "no end"),
    ],
)
def test_rules_that_lead_nowhere(text, message):
    with pytest.raises(ValueError, match=message):
        resolve_rules(text)


def test_nouns():
    nouns = [noun for some in OBJECTS.values() for noun in some]
    assert len(set(nouns)) == len(nouns)
    for noun in (*nouns, *IRREGULAR):
        assert singular_noun(plural_noun(noun)) == noun
    assert [plural_noun(noun) for noun in ("box", "candy", "toy", "knife", "frying pan", "glass", "bus")] == [
        *("boxes", "candies", "toys", "knives", "frying pans", "glasses", "buses")
    ]
    assert (counted(1, "cup"), counted(2, "cup")) == ("1 cup", "2 cups")


# ---- the little world


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs_of_the_little_world(level, split):
    for index in range(20):
        a, b = mapping_pair(level, index, seed=5, split=split)
        assert a.prompt.rsplit(" ", 1)[0] == b.prompt.rsplit(" ", 1)[0] and a.prompt != b.prompt
        for one, other in ((a, b), (b, a)):
            assert isinstance(one.goal, ImageGoal)
            (want,) = one.goal.wants
            assert resolve_rules(one.prompt)[1:].strip("n ") == f"{want.colour} {want.shape}"
            assert ((want.shape, want.colour) in HELD_OUT) == (split == "test")
            assert judge(one, one.target) and not judge(other, one.target), "one image is never right for both"
            assert one.think.count("means") == level
    assert (
        mapping_pair(level, 0, seed=5, split=split)[0].prompt == mapping_pair(level, 0, seed=5, split=split)[0].prompt
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [((0, 1), "level 0"), ((5, 1), "level 5, expected 1 to 4"), ((1, -1), "index -1")],
)
def test_pairs_that_are_not_there(call, message):
    with pytest.raises(ValueError, match=message):
        mapping_pair(*call)
