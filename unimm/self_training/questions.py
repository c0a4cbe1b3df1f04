"""What a model is asked to generate so that it can learn from it: questions of a level that no evaluation asks."""

from collections.abc import Collection
from dataclasses import replace

from unimm.evaluation.benchmarks.base import Benchmark, BenchmarkOptions, JudgeMaker
from unimm.evaluation.benchmarks.shapes import exact_shapes_judge
from unimm.evaluation.benchmarks.unisandbox.benchmark import question_item
from unimm.evaluation.benchmarks.unisandbox.generated import AskedQuestion, generated_questions
from unimm.evaluation.items import EvalItem, item_seed
from unimm.evaluation.judges.readers import JudgeSpec


def round_seed(seed: int, number: int) -> int:
    """The seed of the questions and the noise of a round, from that of the run: rounds of one level differ."""
    return item_seed(seed, "stars", f"round/{number}") % 2**31


class StarsQuestions(Benchmark):
    """New questions of one level, each answered by an image after reasoning.

    Those of the toy world are about pairs of shape and colour of the train split. Of everyday objects those are left
    out that an evaluation asks. Each question is judged by itself, those of a pair, too: it is what is learned from.
    """

    NAME = "stars"
    TAKES = ("n", "think", "tasks", "world")
    JUDGES = ("exact",)

    def __init__(self, options: BenchmarkOptions, *, left_out: Collection[str]) -> None:
        """options: with the one task, the number of questions or pairs, and the world. left_out: prompts."""
        super().__init__(options)
        self.source = f"generated, {options.world}"
        self._left_out = frozenset(left_out)

    def items(self) -> list[EvalItem]:
        """The questions, in an order that does not depend on how many there are."""
        options = self.options
        assert options.tasks is not None and options.n is not None and options.world is not None
        (task,) = options.tasks
        n_more = len(self._left_out) if options.world == "photos" else 0
        asked = generated_questions(task, options.n + n_more, world=options.world, seed=options.seed, split="train")
        barred = {one.question.id for one in asked if one.question.question in self._left_out}
        kept: dict[str, list[AskedQuestion]] = {}
        for one in asked:
            if one.question.id not in barred:
                kept.setdefault(one.question.id, []).append(one)
        return [
            replace(question_item(self.NAME, task, one, seed=options.seed, think=options.think), unit="")
            for some in list(kept.values())[: options.n]
            for one in some
        ]

    def judge_maker(self, spec: JudgeSpec, *, device: str) -> JudgeMaker:
        """The exact judge, of the toy world."""
        return exact_shapes_judge
