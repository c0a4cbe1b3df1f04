"""Every task by name, its examples by number, and text to train a tokenizer on."""

from collections.abc import Callable, Iterator

from unimm.data.shapes import editing, reasoning
from unimm.data.shapes import generation_tasks as drawing
from unimm.data.shapes import question_tasks as asking
from unimm.data.shapes.goal import Example
from unimm.data.shapes.rng import Dice
from unimm.data.shapes.world import known

_BUILDERS: dict[str, Callable[[str, Dice], Example]] = {
    "draw.one": drawing.one,
    "draw.count": drawing.count,
    "draw.relation": drawing.relation,
    "draw.two": drawing.two,
    "draw.place": drawing.place,
    "draw.scene": drawing.full,
    "draw.favourite": drawing.favourite,
    "caption": asking.caption,
    "caption.full": asking.caption_full,
    "answer.count": asking.count,
    "answer.colour": asking.colour,
    "answer.shape": asking.shape,
    "answer.there": asking.there,
    "answer.where": asking.where,
    "answer.relation": asking.relation,
    "answer.compare": asking.compare,
    "edit.recolour": editing.recolour,
    "edit.remove": editing.remove,
    "edit.add": editing.add,
    "edit.swap": editing.swap,
    "edit.resize": editing.resize,
    "reason.math1": reasoning.arithmetic,
    "reason.math2": reasoning.arithmetic,
    "reason.math3": reasoning.arithmetic,
    "reason.map1": reasoning.mapping,
    "reason.map2": reasoning.mapping,
    "reason.map3": reasoning.mapping,
    "fact.forward": reasoning.forward,
    "fact.inverse": reasoning.inverse,
}
TASKS = tuple(_BUILDERS)
SPLITS = ("train", "test")


def example(task: str, index: int, *, seed: int = 0, split: str = "train") -> Example:
    """Example number index of a task: the same for the same arguments, on every machine, whatever came before.

    In the train split no scene, prompt, think, answer or target holds a pair of HELD_OUT; in the test split every
    example asks about one. The fact tasks and draw.favourite are facts: the split only draws another sample of them.
    """
    known("task", task, TASKS)
    known("split", split, SPLITS)
    if index < 0:
        raise ValueError(f"got index {index}, expected 0 or more; the nearest known is 0")
    return _BUILDERS[task](task, Dice(f"shapes/{seed}/{split}/{task}/{index}", test=split == "test"))


def vocabulary_text(n: int, seed: int = 0) -> Iterator[str]:
    """n lines of text, the prompts, thinks and answers of all tasks in turn, of the train split."""
    for line in range(n):
        one = example(TASKS[line % len(TASKS)], line // len(TASKS), seed=seed)
        yield " ".join(part for part in (one.prompt, one.think, one.answer) if part)
