"""Generation tasks that need reasoning, with the reasoning written out, and questions about memorised facts."""

from unimm.data.shapes.generation_tasks import generation_example, wanted_objects
from unimm.data.shapes.goal import AnswerGoal, Example, ImageGoal
from unimm.data.shapes.language import (
    DRAW_LETTER,
    DRAW_SUM,
    FACT_COLOUR,
    FACT_SHAPE,
    FACT_WHO,
    FAVOURITES,
    LETTERS,
    article,
    count_phrase,
    plural,
)
from unimm.data.shapes.rng import ExampleRng

# first steps of a sum with a product: the others would leave 0..9
PRODUCTS = ((2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2))
Step = tuple[str, int, int]


def draw_arithmetic(task: str, rng: ExampleRng) -> Example:
    """draw 3 - 2 red circles: the task's last letter is the number of operations."""
    result = rng.integer(1, 4)
    start, steps = _sample_sum(rng, int(task[-1]), result)
    shape, colour = rng.subject()
    words = f"{colour} {shape}"
    total = " ".join([str(start), *(f"{sign} {operand}" for sign, operand, _ in steps)])
    prompt = rng.choice(DRAW_SUM).format(sum=total, what=plural(words))
    values = [start, *(value for _, _, value in steps)]
    operations = zip(values[:-1], steps, strict=True)
    lines = [f"{before} {sign} {operand} = {value}." for before, (sign, operand, value) in operations]
    scene = rng.scene([(shape, colour)] * result)
    think = " ".join([*lines, f"draw {count_phrase(result, words)}."])
    return generation_example(task, prompt, scene, ImageGoal(wants=wanted_objects(scene)), think)


def _sample_sum(rng: ExampleRng, n: int, result: int) -> tuple[int, list[Step]]:
    """A start and n steps (sign, operand, value) that end at result, every value in 0..9."""
    # the last step must change the value, so what comes before it may not be the result yet
    values = [value for value in range(1, 10) if n > 1 or value != result]
    start = rng.choice(values)
    steps: list[Step] = []
    if n == 3 and rng.integer(0, 2) == 0:
        start, factor = rng.choice(PRODUCTS)
        steps.append(("*", factor, start * factor))
    while len(steps) < n:
        value = steps[-1][2] if steps else start
        last = len(steps) == n - 1
        barred = {value, result} if len(steps) == n - 2 else {value}
        goal = result if last else rng.choice([v for v in range(10) if v not in barred])
        steps.append(("+", goal - value, goal) if goal > value else ("-", value - goal, goal))
    return start, steps


def draw_mapping(task: str, rng: ExampleRng) -> Example:
    """rule 1: A means a red circle. draw A: the task's last letter is the length of the chain."""
    level = int(task[-1])
    letters = rng.shuffled(LETTERS)
    pairs = rng.distinct_pairs(3)
    phrases = [article(f"{colour} {shape}") for shape, colour in pairs]
    chain = [f"{a} means {b}." for a, b in zip(letters[:level], [*letters[1:level], phrases[0]], strict=True)]
    rules = chain
    if level == 3:
        others = phrases[1 : 1 + rng.integer(1, 2)]
        spare = [f"{a} means {b}." for a, b in zip(letters[level : level + len(others)], others, strict=True)]
        rules = rng.shuffled(chain + spare)
    numbered = [f"rule {number}: {rule}" for number, rule in enumerate(rules, start=1)]
    prompt = " ".join([*numbered, rng.choice(DRAW_LETTER).format(letter=letters[0])])
    scene = rng.scene(pairs[:1])
    think = " ".join([*chain, f"draw {phrases[0]}."])
    return generation_example(task, prompt, scene, ImageGoal(wants=wanted_objects(scene)), think)


def fact_forward(task: str, rng: ExampleRng) -> Example:
    """which shape does Tom like? A fact, to which the split does not apply."""
    name = rng.choice(tuple(FAVOURITES))
    shape, colour = FAVOURITES[name]
    wordings, answer = (FACT_SHAPE, shape) if rng.coin() else (FACT_COLOUR, colour)
    return Example(
        task=task, prompt=rng.choice(wordings).format(name=name), goal=AnswerGoal(text=answer), answer=answer
    )


def fact_inverse(task: str, rng: ExampleRng) -> Example:
    """who likes the red star? A fact, to which the split does not apply."""
    name = rng.choice(tuple(FAVOURITES))
    shape, colour = FAVOURITES[name]
    prompt = rng.choice(FACT_WHO).format(what=f"the {colour} {shape}")
    return Example(task=task, prompt=prompt, goal=AnswerGoal(text=name), answer=name)
