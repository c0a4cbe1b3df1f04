"""The value of the arithmetic in a text, found from the text alone: in symbols, in words, or in steps.

Of the question "Draw as many cups as (9 - 5) / 2 + 2." it is 4. What is made here is checked by it, and so are the labels
of files that others made. A modulo, as a product, goes before a sum; a root takes the number or the parentheses behind it.
"""

import re
from fractions import Fraction
from math import isqrt

# words and signs to one sign each, the longest first; a step applies to all that stands before it
_WORDS = (
    (r"(?:the )?square root of", "\u221a"),
    (r"rounded down|round down|round it down", "floor"),
    (r"take (?:the |its )?square root", "root_step"),
    (r"square it", "square_step"),
    (r"cube it", "cube_step"),
    (r"squared|\u00b2", "^2"),
    (r"cubed|\u00b3", "^3"),
    (r"to the power of|\*\*", "^"),
    (r"multiplied by|times|\u00d7", "*"),
    (r"divided by|\u00f7", "/"),
    (r"modulo|mod", "%"),
    (r"plus", "+"),
    (r"minus|\u2212|\u2013", "-"),
)
_STEPS = (
    (r"multiply (?:it )?by", "step*"),
    (r"divide (?:it )?by", "step/"),
    (r"take the rest modulo", "step%"),
    (r"take away|subtract", "step-"),
    (r"add", "step+"),
)
_TOKEN = re.compile(r"step[-+*/%]|root_step|square_step|cube_step|floor|\d+|[-+*/%^()\u221a]|[a-z]+")
# what may stand between steps, and behind all
_FILLERS = {"then", "and", "equals", "gives", "makes", "is", "it"}
_VARIABLE = re.compile(r"\bwhere ([a-z]) ?= ?(\d+)")


class _IrrationalError(ArithmeticError):
    """A root that is no fraction."""


def evaluate_text(text: str) -> Fraction | None:
    """The value of the arithmetic in a text; None for one that is no fraction, as the root of 10, or is not defined.

    Raises ValueError for a text without arithmetic, or with something in it that is not understood.
    """
    line = " ".join(text.lower().split())
    for name, value in _VARIABLE.findall(line):
        line = re.sub(rf"\b{name}(?![a-z])", value, line[: line.index(" where ")])
    for words, sign in (*_STEPS, *_WORDS):
        line = re.sub(rf"(?<![a-z])(?:{words})(?![a-z])", f" {sign} ", line)
    begin = re.search(r"[\d(\u221a]", line)
    if begin is None:
        raise ValueError(f"found no arithmetic in {text!r}: expected a number")
    rest = re.sub(r"[,.?;:!]", " ", line[begin.start() :])
    reader = _Reader(_TOKEN.findall(rest), text)
    if leftover := _TOKEN.sub("", rest).strip():
        raise ValueError(f"cannot read {leftover!r} in {text!r}: expected arithmetic in symbols, words or steps")
    try:
        return reader.steps()
    except (_IrrationalError, ZeroDivisionError):
        return None


class _Reader:
    """Reads tokens from the left, by recursive descent."""

    def __init__(self, tokens: list[str], text: str) -> None:
        self._tokens = tokens
        self._text = text
        self._at = 0

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *signs: str) -> str:
        """The next token if it is one of these, and past it."""
        token = self._next()
        if token not in signs or not token:
            return ""
        self._at += 1
        return token

    def steps(self) -> Fraction:
        """Sums, each step applied to all before it, to the end of the text."""
        value = self._sum()
        while self._next():
            if self._next() in _FILLERS:
                self._at += 1
            elif self._take("floor"):
                value = Fraction(value.numerator // value.denominator)
            elif self._take("root_step"):
                value = _root(value)
            elif sign := self._take("square_step", "cube_step"):
                value **= 2 if sign == "square_step" else 3
            elif sign := self._take(*(sign for _, sign in _STEPS)):
                value = _apply(sign[-1], value, self._product())
            else:
                raise ValueError(
                    f"cannot read {self._next()!r} in {self._text!r}: expected the arithmetic to end there"
                )
        return value

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._take("+", "-"):
            value = _apply(sign, value, self._product())
        return value

    def _product(self) -> Fraction:
        value = self._root_or_power()
        while sign := self._take("*", "/", "%"):
            value = _apply(sign, value, self._root_or_power())
        return value

    def _root_or_power(self) -> Fraction:
        if self._take("\u221a"):
            return _root(self._root_or_power())
        value = self._atom()
        if not self._take("^"):
            return value
        exponent = self._root_or_power()
        if exponent.denominator != 1:
            raise _IrrationalError
        return value ** int(exponent)

    def _atom(self) -> Fraction:
        if self._take("("):
            value = self._sum()
            if not self._take(")"):
                raise ValueError(f"got no closing parenthesis in {self._text!r}")
            return value
        token = self._next()
        if not token.isdecimal():
            raise ValueError(f"got {token or 'the end'!r} in {self._text!r}: expected a number there")
        self._at += 1
        return Fraction(int(token))


def _apply(sign: str, a: Fraction, b: Fraction) -> Fraction:
    if sign == "+":
        return a + b
    if sign == "-":
        return a - b
    if sign == "*":
        return a * b
    return a / b if sign == "/" else a % b


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise _IrrationalError
    root = Fraction(isqrt(value.numerator), isqrt(value.denominator))
    if root * root != value:
        raise _IrrationalError
    return root
