"""What a symbol of a question finally stands for, by its rules, found from the text alone."""

import re

# what a rule may say, the longest first
_VERBS = "is mapped to|maps to|stands for|refers to|represents|means"
_RULE = re.compile(rf"rule \d+: (.+?) (?:{_VERBS}) (.+?)\.(?= |$)", re.IGNORECASE)


def resolve_rules(text: str) -> str:
    """What the symbol that a question names behind its rules stands for at the end of the chain: "a red circle".

    The rules are "Rule 1: 'A' means 'B'. Rule 2: 'B' means a cup."; quotes may be missing. Raises ValueError for a text
    without rules or symbol, for two rules of one symbol, and for a chain that ends in no object or has no end.
    """
    rules: dict[str, str] = {}
    for name, meaning in _RULE.findall(text):
        symbol = _unquoted(name)
        if symbol in rules:
            raise ValueError(f"got two rules for {symbol} in {text!r}: expected one")
        rules[symbol] = _unquoted(meaning)
    question = _RULE.sub("", text)
    words = [_unquoted(word.strip(" .,?!")) for word in question.split()]
    asked = [word for word in words if word in rules]
    if not rules or len(asked) != 1:
        raise ValueError(
            f"got {len(rules)} rules and {len(asked)} of their symbols asked for in {text!r}: expected one"
        )
    symbol = asked[0]
    for _ in rules:
        symbol = rules[symbol]
        if symbol not in rules:
            if len(symbol) == 1:
                raise ValueError(f"the chain of {asked[0]} ends in {symbol}, which no rule explains: {text!r}")
            return symbol
    raise ValueError(f"the chain of {asked[0]} has no end: {text!r}")


def _unquoted(text: str) -> str:
    return text.strip().strip("'\"")
