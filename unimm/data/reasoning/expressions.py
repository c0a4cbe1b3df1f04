"""Arithmetic expressions whose every value is a whole number, sampled for a result, and written in symbols or steps."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isqrt

from unimm.data.seeded_rng import SeededRng

# signs as they are written; "root" is the square root
OPERATIONS = ("+", "-", "*", "/", "%", "^", "root")
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "%": 2, "^": 4}
ROOT_PRECEDENCE = 3
ATOM = 5
# values above this are left out: they should be worked out in the head
LARGEST = 100
LARGEST_FACTOR = 10
STEPS = {"+": "add {}", "-": "subtract {}", "*": "multiply by {}", "/": "divide by {}", "%": "take the rest modulo {}"}
POWERS = {2: "square it", 3: "cube it"}


@dataclass(frozen=True, kw_only=True)
class Number:
    """A whole number."""

    value: int


@dataclass(frozen=True, kw_only=True)
class Operation:
    """left sign right."""

    sign: str
    left: "Expression"
    right: "Expression"


@dataclass(frozen=True, kw_only=True)
class Root:
    """The square root of an expression."""

    of: "Expression"


Expression = Number | Operation | Root


def sample_expression(
    rng: SeededRng, value: int, n_operations: int, operations: Sequence[str] = OPERATIONS
) -> Expression:
    """An expression of so many operations that equals `value`; every value in it is a whole number of 1 or more."""
    if n_operations == 0:
        return Number(value=value)
    for sign in rng.shuffled(operations):
        if sign == "root":
            if value * value <= LARGEST and value > 1:
                return Root(of=sample_expression(rng, value * value, n_operations - 1, operations))
            continue
        if operands := _operands(sign, value):
            left, right = rng.choice(operands)
            # a power's exponent stays a number
            n_left = n_operations - 1 if sign == "^" else rng.integer(0, n_operations - 1)
            return Operation(
                sign=sign,
                left=sample_expression(rng, left, n_left, operations),
                right=sample_expression(rng, right, n_operations - 1 - n_left, operations),
            )
    raise ValueError(f"no operation of {' '.join(operations)} gives {value}: add -, which gives every number")


def _operands(sign: str, value: int) -> list[tuple[int, int]]:
    """Pairs of whole numbers that the operation takes to the value, none of which leaves it as it was."""
    if sign == "+":
        return [(a, value - a) for a in range(1, value)]
    if sign == "-":
        return [(value + b, b) for b in range(1, LARGEST_FACTOR) if value + b <= LARGEST]
    if sign == "*":
        return [
            (a, value // a) for a in range(2, LARGEST_FACTOR + 1) if value % a == 0 and 1 < value // a <= LARGEST_FACTOR
        ]
    if sign == "/":
        return [(value * b, b) for b in range(2, LARGEST_FACTOR + 1) if value * b <= LARGEST]
    if sign == "%":
        return [
            (value + b * n, b)
            for b in range(value + 1, LARGEST_FACTOR + 1)
            for n in (1, 2, 3)
            if value + b * n <= LARGEST
        ]
    roots = [(isqrt(value), 2), (round(value ** (1 / 3)), 3)]
    return [(root, power) for root, power in roots if root > 1 and root**power == value]


def count_operations(expression: Expression) -> int:
    """The number of operations, roots too."""
    if isinstance(expression, Number):
        return 0
    if isinstance(expression, Root):
        return 1 + count_operations(expression.of)
    return 1 + count_operations(expression.left) + count_operations(expression.right)


def format_expression(expression: Expression, *, root: str = "\u221a") -> str:
    """In symbols, with no more parentheses than are needed: (9 - 5) / 2 + 2. root: the sign of the square root."""
    return _format(expression, 0, root)


def _format(expression: Expression, precedence: int, root: str) -> str:
    """precedence: of what stands around it; a weaker operation gets parentheses."""
    if isinstance(expression, Number):
        return str(expression.value)
    if isinstance(expression, Root):
        text = root + _format(expression.of, ATOM, root)
        return f"({text})" if precedence > ROOT_PRECEDENCE else text
    own = PRECEDENCE[expression.sign]
    # operations of one precedence go from the left; a power's base is never bare
    left = _format(expression.left, ATOM if expression.sign == "^" else own, root)
    right = _format(expression.right, own + 1, root)
    gap = "" if expression.sign == "^" else " "
    text = f"{left}{gap}{expression.sign}{gap}{right}"
    return f"({text})" if own < precedence else text


def format_steps(expression: Expression) -> str | None:
    """In steps from the first number on: start with 16, take the square root, subtract 3; None where an operation has
    no number on its right."""
    if isinstance(expression, Number):
        return f"start with {expression.value}"
    if isinstance(expression, Root):
        before = format_steps(expression.of)
        return before and f"{before}, take the square root"
    before = format_steps(expression.left)
    if before is None or not isinstance(expression.right, Number):
        return None
    number = expression.right.value
    return f"{before}, {POWERS[number] if expression.sign == '^' else STEPS[expression.sign].format(number)}"


def check_operations(operations: Collection[str]) -> None:
    """Raise ValueError for an operation that is none of OPERATIONS."""
    if unknown := [one for one in operations if one not in OPERATIONS]:
        raise ValueError(f"got the operation {unknown[0]!r}: expected some of {' '.join(OPERATIONS)}")
    if not operations:
        raise ValueError(f"got no operations: expected some of {' '.join(OPERATIONS)}")
