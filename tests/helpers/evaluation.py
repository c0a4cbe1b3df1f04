"""A painter that knows the right image of every example of the little world, and runs of a benchmark with it."""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from PIL import Image

from unimm.data.shapes import example
from unimm.evaluation.benchmarks.base import Benchmark, BenchmarkOptions
from unimm.evaluation.benchmarks.shapes import TASKS, ShapesBenchmark
from unimm.evaluation.judges.base import ItemJudge
from unimm.evaluation.judges.readers import JudgeSpec, Reader
from unimm.evaluation.run import ModelSource, RunState, run_benchmark
from unimm.evaluation.sharding import RunShard
from unimm.models.base import Generation

N, SEED = 6, 3


class Oracle:
    """Knows the right output of every prompt; spoils those of `wrong` tasks; notes how it was asked."""

    def __init__(self, wrong: tuple[str, ...] = (), side: int = 64, *, tasks: Collection[str] = TASKS, n: int = N):
        self.wrong, self.side = wrong, side
        self.known = {}
        for task in {task.removesuffix(".think") for task in tasks}:
            for index in range(n):
                one = example(task, index, seed=SEED, split="test")
                self.known[one.prompt, self.key(map(Image.fromarray, one.images))] = one
        self.calls = []

    @staticmethod
    def key(images) -> bytes:
        return b"".join(image.tobytes() for image in images)

    def find(self, prompts, images):
        return [self.known[prompt, self.key(some)] for prompt, some in zip(prompts, images, strict=True)]

    def generate(self, prompt, *, images, seed, think=False):
        self.calls.append((tuple(prompt), think, tuple(seed)))
        found = self.find(prompt, images or [[] for _ in prompt])
        blank = np.full((64, 64, 3), 128, np.uint8)
        drawn = [Image.fromarray(blank if one.task in self.wrong else one.target) for one in found]
        texts = [one.think or "" for one in found] if think else []
        return Generation([image.resize((self.side, self.side), Image.Resampling.NEAREST) for image in drawn], texts)

    def understand(self, images, question):
        return ["no idea" if one.task in self.wrong else one.answer for one in self.find(question, images)]


def run_toy(
    out: Path,
    model: object,
    *,
    benchmark: Benchmark | None = None,
    judge: Callable[[], ItemJudge] | None = None,
    shard: RunShard | None = None,
    batch: int = 2,
    name: str = "oracle",
) -> RunState:
    """A run with a model that is no module, in batches of 2; of the little world unless given."""
    made = benchmark or ShapesBenchmark(BenchmarkOptions(n=N, seed=SEED, tasks=("draw.one", "edit.add")))
    source = ModelSource(name=name, load=lambda: model)
    judge = judge or judge_of(made)
    return run_benchmark(made, source, judge, out, shard=shard, batch_size=batch, progress=False)


def judge_of(benchmark: Benchmark, reader: Reader | None = None) -> Callable[[], ItemJudge]:
    """What makes a benchmark's exact judge, or that of a reader."""
    make = benchmark.judge_maker(JudgeSpec(kind="vlm" if reader else "exact"), device="cpu")
    return lambda: make(reader)


def scores_of(state: RunState) -> dict[str, float]:
    """The scores of a run that is done."""
    return {name: score["score"] for name, score in state.result["scores"].items()}
