"""Every task by name, its examples by index, and text to train a tokenizer on."""

from collections.abc import Callable, Iterator

from unimm.data.shapes import editing, reasoning
from unimm.data.shapes import generation_tasks as drawing
from unimm.data.shapes import question_tasks as asking
from unimm.data.shapes.goal import Example
from unimm.data.shapes.rng import ExampleRng
from unimm.data.shapes.world import check_known

_BUILDERS: dict[str, Callable[[str, ExampleRng], Example]] = {
    "draw.one": drawing.draw_one,
    "draw.count": drawing.draw_count,
    "draw.relation": drawing.draw_relation,
    "draw.two": drawing.draw_two,
    "draw.place": drawing.draw_place,
    "draw.scene": drawing.draw_scene,
    "draw.favourite": drawing.draw_favourite,
    "caption": asking.describe_objects,
    "caption.full": asking.describe_places,
    "answer.count": asking.answer_count,
    "answer.colour": asking.answer_colour,
    "answer.shape": asking.answer_shape,
    "answer.there": asking.answer_there,
    "answer.where": asking.answer_where,
    "answer.relation": asking.answer_relation,
    "answer.compare": asking.answer_compare,
    "edit.recolour": editing.edit_recolour,
    "edit.remove": editing.edit_remove,
    "edit.add": editing.edit_add,
    "edit.swap": editing.edit_swap,
    "edit.resize": editing.edit_resize,
    "reason.math1": reasoning.draw_arithmetic,
    "reason.math2": reasoning.draw_arithmetic,
    "reason.math3": reasoning.draw_arithmetic,
    "reason.map1": reasoning.draw_mapping,
    "reason.map2": reasoning.draw_mapping,
    "reason.map3": reasoning.draw_mapping,
    "fact.forward": reasoning.fact_forward,
    "fact.inverse": reasoning.fact_inverse,
}
TASKS = tuple(_BUILDERS)
SPLITS = ("train", "test")


def example(task: str, index: int, *, seed: int = 0, split: str = "train") -> Example:
    """Example number index of a task: the same for the same arguments, on every machine, whatever came before.

    In the train split no scene, prompt, think, answer or target holds a pair of HELD_OUT; in the test split every
    example is about one. The fact tasks and draw.favourite are facts: the split only gives another sample of them.
    """
    check_known("task", task, TASKS)
    check_known("split", split, SPLITS)
    if index < 0:
        raise ValueError(f"got index {index}, expected 0 or more; the nearest known is 0")
    return _BUILDERS[task](task, ExampleRng(f"shapes/{seed}/{split}/{task}/{index}", test=split == "test"))


def tokenizer_corpus(n: int, seed: int = 0) -> Iterator[str]:
    """n lines of text: prompts, reasoning and answers of all tasks in turn, of the train split."""
    for line in range(n):
        one = example(TASKS[line % len(TASKS)], line // len(TASKS), seed=seed)
        yield " ".join(part for part in (one.prompt, one.think, one.answer) if part)
