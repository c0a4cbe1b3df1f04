"""Accuracy in the shapes world: generating, answering, editing and reasoning about pairs that training never held.

Generated scenes are parsed from their pixels, so no model scores another. Every example and every image's noise follows
from (seed, task, index): a score does not depend on the batch size, but for rounding.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from unimm.data.shapes import AnswerGoal, Example, Goal, ImageGoal, example, judge
from unimm.data.shapes.world import IMAGE_SIZE
from unimm.evaluation.benchmarks.base import Benchmark, BenchmarkOptions, JudgeMaker
from unimm.evaluation.generating import BenchmarkModel, ModelOutput, produce
from unimm.evaluation.items import EvalItem, item_seed, make_batches
from unimm.evaluation.judges.base import ExactJudge, ItemJudge, JudgeTask, Verdict
from unimm.evaluation.judges.readers import JudgeSpec, Reader
from unimm.evaluation.scores import wilson_interval
from unimm.models.base import UnifiedModel
from unimm.processing.images.io import resize

THINK_SUFFIX = ".think"
REASONING_TASKS = tuple(f"reason.{kind}{level}" for kind in ("math", "map") for level in (1, 2, 3))
# what is scored; reasoning tasks twice: generated at once, and after the model's own reasoning
TASKS = (
    *("draw.one", "draw.count", "draw.relation", "draw.two"),
    *("answer.count", "answer.colour", "answer.shape", "answer.relation"),
    *("edit.recolour", "edit.remove", "edit.add"),
    *REASONING_TASKS,
    *(task + THINK_SUFFIX for task in REASONING_TASKS),
)


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """The part of n examples that was right, and the ends of its 95 % interval (Wilson 1927)."""

    accuracy: float
    n: int
    low: float
    high: float

    @classmethod
    def from_counts(cls, right: int, n: int) -> "BenchmarkScore":
        """The score of so many right examples of n."""
        low, high = wilson_interval(right / n, n)
        return cls(accuracy=right / n, n=n, low=low, high=high)


def evaluate(
    model: BenchmarkModel,
    *,
    n: int,
    seed: int,
    split: str = "test",
    tasks: Sequence[str] | None = None,
    batch_size: int = 50,
    progress: bool = True,
) -> dict[str, BenchmarkScore]:
    """Score a model on n examples of each task (all of TASKS unless given), `batch_size` at a time.

    Raises ValueError for a task that is none of TASKS, and for numbers below 1.
    """
    tasks = check_tasks(TASKS if tasks is None else tasks)
    for name, number in (("n", n), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"got {name} {number}: expected at least 1")
    scores = {}
    with tqdm(total=n * len(tasks), unit="example", disable=not progress) as bar:
        for task in tasks:
            bar.set_description(task)
            n_right = 0
            for batch in make_batches(task_items(task, n, seed=seed, split=split), batch_size):
                results = [is_right(item, output) for item, output in zip(batch, produce(model, batch), strict=True)]
                n_right += sum(results)
                bar.update(len(results))
            scores[task] = BenchmarkScore.from_counts(n_right, n)
    return scores


class ShapesBenchmark(Benchmark):
    """The benchmark as `unimm eval` runs it."""

    NAME = "shapes"
    TAKES = ("n", "tasks")
    JUDGES = ("exact",)

    def __init__(self, options: BenchmarkOptions) -> None:
        super().__init__(options)
        self.source = "generated"
        self.batch = 50

    def items(self) -> list[EvalItem]:
        """n items (500 unless given) of each task, of those that the model can do unless some are named."""
        options = self.options
        tasks = check_tasks(tasks_of(thinks=options.supports_thinking) if options.tasks is None else options.tasks)
        n = 500 if options.n is None else options.n
        return [item for task in tasks for item in task_items(task, n, seed=options.seed, split="test")]

    def judge_maker(self, spec: JudgeSpec, *, device: str) -> JudgeMaker:
        """The exact judge."""
        return exact_shapes_judge


def exact_shapes_judge(reader: Reader | None = None) -> ItemJudge:
    """The scene is parsed from the image; an answer is compared."""
    return ExactJudge(judge_example, "unimm.data.shapes.judge")


def supported_tasks(model: UnifiedModel) -> tuple[str, ...]:
    """The tasks that a model's verbs can do: without think mode, those after reasoning are left out."""
    return tasks_of(thinks=model.supports_thinking)


def tasks_of(*, thinks: bool) -> tuple[str, ...]:
    """The tasks of a model that can think, or cannot."""
    return tuple(task for task in TASKS if thinks or not task.endswith(THINK_SUFFIX))


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks, each once. Raises ValueError for an unknown one, with the nearest."""
    if not tasks:
        raise ValueError(f"got no tasks: expected some of {', '.join(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            nearest = difflib.get_close_matches(task, TASKS, n=3, cutoff=0.4) or TASKS
            raise ValueError(
                f"unknown task {task!r}: expected one that is scored; the nearest are {', '.join(nearest)}"
            )
    return tuple(dict.fromkeys(tasks))


def task_items(task: str, n: int, *, seed: int, split: str) -> list[EvalItem]:
    """The first n items of a task; the noise of an image is the same with and without reasoning."""
    name = task.removesuffix(THINK_SUFFIX)
    return [
        EvalItem(
            id=f"{task}/{index}",
            group=task,
            prompt=one.prompt,
            seed=noise_seed(seed, name, index),
            images=tuple(input_images(one)),
            think=task.endswith(THINK_SUFFIX),
            output="image" if one.answer is None else "text",
            answer=describe_goal(one.goal),
            payload=one,
        )
        for index in range(n)
        for one in [example(name, index, seed=seed, split=split)]
    ]


def describe_goal(goal: Goal) -> str:
    """A goal in words, for manifests."""
    if not isinstance(goal, ImageGoal):
        return goal.text if isinstance(goal, AnswerGoal) else ", ".join(goal.phrases)
    objects = [
        " ".join(str(part) for part in (want.size, want.colour, want.shape, want.place, want.position) if part)
        for want in goal.wants
    ]
    return "; ".join([*objects, *(f"{a} {relation} {b}" for a, relation, b in goal.relations)])


def is_right(item: EvalItem, output: ModelOutput) -> bool:
    """Whether an output is that of its item's example."""
    return judge(item.payload, output.text if output.image is None else to_scene_array(output.image))


def judge_example(task: JudgeTask) -> Verdict:
    """The verdict on an output that is kept."""
    image = None if task.image_path is None else task.load_image()
    return Verdict(score=float(is_right(task.item, ModelOutput(image=image, text=task.text))))


def input_images(one: Example) -> list[Image.Image]:
    """An example's input images."""
    return [Image.fromarray(image) for image in one.images]


def to_scene_array(image: Image.Image) -> NDArray[np.uint8]:
    """A generated image as the parser takes it, uint8 [64, 64, 3]."""
    image = image.convert("RGB")
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.asarray(image if image.size == size else resize(image, size, Image.Resampling.BOX))


def noise_seed(seed: int, task: str, index: int) -> int:
    """The seed of an image's noise, 0 to 2^63 - 1; the same with and without reasoning."""
    return item_seed(seed, "noise", f"{task}/{index}")
