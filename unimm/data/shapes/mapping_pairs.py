"""Two questions about the same rules, whose right images differ: who draws one image for both is right about one."""

from unimm.data.shapes.generation_tasks import generation_example, wanted_objects
from unimm.data.shapes.goal import Example, ImageGoal
from unimm.data.shapes.language import DRAW_LETTER, LETTERS, article
from unimm.data.shapes.rng import ExampleRng
from unimm.data.shapes.tasks import SPLITS
from unimm.data.shapes.world import check_known

LONGEST_CHAIN = len(LETTERS) // 2


def mapping_pair(level: int, index: int, *, seed: int = 0, split: str = "train") -> tuple[Example, Example]:
    """Pair number index of the rules "rule 1: A means B. rule 2: C means a red circle. ... draw A", and "draw C".

    level: the length of each of the two chains; their rules stand in random order. Both objects are held out in the
    test split, as in `example`.
    """
    check_known("split", split, SPLITS)
    if not 1 <= level <= LONGEST_CHAIN:
        raise ValueError(f"got level {level}, expected 1 to {LONGEST_CHAIN}: the letters are no more")
    if index < 0:
        raise ValueError(f"got index {index}, expected 0 or more; the nearest known is 0")
    task = f"pair.map{level}"
    rng = ExampleRng(f"shapes/{seed}/{split}/{task}/{index}", test=split == "test")
    letters = rng.shuffled(LETTERS)
    first = rng.subject()
    pairs = [first, rng.other_pair(lambda pair: pair != first, subject=True)]
    starts = [letters[:level], letters[level : 2 * level]]
    chains = []
    for names, (shape, colour) in zip(starts, pairs, strict=True):
        chains.append(
            [f"{a} means {b}." for a, b in zip(names, [*names[1:], article(f"{colour} {shape}")], strict=True)]
        )
    rules = rng.shuffled([rule for chain in chains for rule in chain])
    numbered = [f"rule {number}: {rule}" for number, rule in enumerate(rules, start=1)]
    wording = rng.choice(DRAW_LETTER)
    examples = []
    for names, chain, pair in zip(starts, chains, pairs, strict=True):
        prompt = " ".join([*numbered, wording.format(letter=names[0])])
        think = " ".join([*chain, f"draw {article(f'{pair[1]} {pair[0]}')}."])
        scene = rng.scene([pair])
        examples.append(generation_example(task, prompt, scene, ImageGoal(wants=wanted_objects(scene)), think))
    return examples[0], examples[1]
