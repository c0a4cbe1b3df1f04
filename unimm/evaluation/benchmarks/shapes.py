"""Accuracy in the shapes world: generating, answering, editing and reasoning about pairs that training never held.

Generated scenes are parsed from their pixels, so no model scores another. Every example and every image's noise follows
from (seed, task, index): a score does not depend on the batch size, but for rounding.
"""

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binomtest
from tqdm import tqdm

from unimm.data.shapes import Example, example, judge
from unimm.data.shapes.world import IMAGE_SIZE
from unimm.models.base import Generation, UnifiedModel

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
ImageLists = list[list[Image.Image]]


class BenchmarkModel(Protocol):
    """The verbs that are scored, in batches."""

    def generate(self, prompt: Sequence[str], *, images: ImageLists | None, seed: Sequence[int]) -> Generation: ...

    def understand(self, images: ImageLists, question: Sequence[str]) -> list[str]: ...


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
        interval = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
        return cls(accuracy=right / n, n=n, low=float(interval.low), high=float(interval.high))


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
            for start in range(0, n, batch_size):
                indices = range(start, min(start + batch_size, n))
                results = list(score_batch(model, task, indices, seed=seed, split=split))
                n_right += sum(results)
                bar.update(len(results))
            scores[task] = BenchmarkScore.from_counts(n_right, n)
    return scores


def supported_tasks(model: UnifiedModel) -> tuple[str, ...]:
    """The tasks that a model's verbs can do: without think mode, those after reasoning are left out."""
    return tuple(task for task in TASKS if model.supports_thinking or not task.endswith(THINK_SUFFIX))


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


def score_batch(model: BenchmarkModel, task: str, indices: Sequence[int], *, seed: int, split: str) -> Iterator[bool]:
    """Whether the model is right, for each example of one batch."""
    name = task.removesuffix(THINK_SUFFIX)
    examples = [example(name, index, seed=seed, split=split) for index in indices]
    prompts = [one.prompt for one in examples]
    images = [input_images(one) for one in examples]
    if examples[0].answer is not None:
        yield from map(judge, examples, model.understand(images, prompts))
        return
    # only families that support it have the parameter
    options: dict[str, Any] = {"think": True} if task.endswith(THINK_SUFFIX) else {}
    seeds = [noise_seed(seed, name, index) for index in indices]
    generated = model.generate(prompts, images=images if any(images) else None, seed=seeds, **options)
    yield from (judge(one, to_scene_array(image)) for one, image in zip(examples, generated.images, strict=True))


def input_images(one: Example) -> list[Image.Image]:
    """An example's input images."""
    return [Image.fromarray(image) for image in one.images]


def to_scene_array(image: Image.Image) -> NDArray[np.uint8]:
    """A generated image as the parser takes it, uint8 [64, 64, 3]."""
    image = image.convert("RGB")
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BOX))


def noise_seed(seed: int, task: str, index: int) -> int:
    """The seed of an image's noise, 0 to 2^63 - 1; the same with and without reasoning."""
    digest = hashlib.sha256(f"noise/{seed}/{task}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
