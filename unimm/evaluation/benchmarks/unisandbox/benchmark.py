"""UniSandBox as `unimm eval` runs it: its own items or new ones, two sets of labels, published scores."""

from pathlib import Path

from unimm.data.knowledge.files import read_world
from unimm.data.reasoning.questions import ReasoningQuestion
from unimm.evaluation.benchmarks.base import (
    NAMED_JUDGES,
    Benchmark,
    BenchmarkOptions,
    JudgeMaker,
    PublishedScores,
    choose,
    reader_judge_maker,
)
from unimm.evaluation.benchmarks.shapes import exact_shapes_judge
from unimm.evaluation.benchmarks.unisandbox.files import KNOWLEDGE, MAPPING, MATH, TASKS, WORDS, read_task
from unimm.evaluation.benchmarks.unisandbox.generated import WORLDS, AskedQuestion, generated_questions
from unimm.evaluation.benchmarks.unisandbox.judge_questions import (
    find_judge_folder,
    hash_texts,
    official_dialogue,
    read_judge_texts,
    shapes_dialogue,
)
from unimm.evaluation.benchmarks.unisandbox.knowledge import SHAPES_TASKS, shapes_example
from unimm.evaluation.benchmarks.unisandbox.labels import corrected
from unimm.evaluation.items import EvalItem, item_seed
from unimm.evaluation.judges.readers import JudgeSpec

REASONING = (*MATH, *MAPPING)
# questions of a level, or pairs of them, unless a run says otherwise: as many as the original has
N_GENERATED = 100
TABLE = "UniSandBox, table 1, by Qwen2.5-VL-7B"


def _row(model: str, *scores: float, think: bool = False) -> PublishedScores:
    average = round(sum(scores) / len(scores), 4)
    named = {**dict(zip(REASONING, scores, strict=True)), "average": average}
    return PublishedScores(model=model, scores=named, think=think, source=TABLE)


PUBLISHED = (
    _row("Janus-Pro-7B", 0.04, 0.03, 0.03, 0, 0, 0),
    _row("UniWorld-V1", 0.11, 0.06, 0.02, 0, 0, 0),
    _row("OmniGen2", 0.08, 0.07, 0.08, 0, 0, 0),
    _row("Qwen-Image", 0.13, 0.07, 0.10, 0, 0, 0),
    _row("BAGEL", 0.07, 0.06, 0.04, 0, 0, 0),
    _row("BAGEL", 0.60, 0.44, 0.23, 0.74, 0.60, 0.45, think=True),
    _row("gpt-image-1", 0.66, 0.36, 0.19, 0.75, 0.53, 0.36),
    _row("nano-banana", 0.66, 0.64, 0.42, 0.44, 0.44, 0.50),
)


class UniSandBoxBenchmark(Benchmark):
    """Arithmetic and mapping of three levels, and knowledge of characters that a model was taught."""

    NAME = "unisandbox"
    TAKES = ("items", "labels", "n", "think", "tasks", "world", "judge_prompts")
    JUDGES = ("exact", "vlm", "openai")
    UNIT = "all"
    OVERALL = "average"

    def __init__(self, options: BenchmarkOptions) -> None:
        super().__init__(options)
        given = options.items or "generated"
        self._path = None if given == "generated" else Path(given).expanduser()
        if self._path is None and options.labels is not None:
            raise ValueError("got --labels for generated items, whose labels are right: leave it out")
        if self._path is not None and options.world is not None:
            raise ValueError("got --world for the benchmark's own items, which are photos: leave it out")
        self._labels = choose("labels", options.labels, ("official", "corrected"))
        # that of characters that were made up, where the files are about these
        made_up = read_world(self._path) if self._path else None
        self._world = made_up or "photos" if self._path else choose("world", options.world, WORLDS)
        self._known = REASONING
        if self._path:
            self._known = SHAPES_TASKS if made_up == "shapes" else TASKS
        # what is asked unless tasks are named
        self._usual = REASONING if made_up is None else self._known if made_up == "shapes" else KNOWLEDGE
        self.source = f"generated, {self._world}"
        if self._path:
            self.source = f"generated characters, {made_up}" if made_up else "released files"
        # images of the little world are small, and can be judged exactly
        self.default_judge = "exact" if self._world == "shapes" else None
        self.batch = 50 if self._world == "shapes" else 1
        self.resolved = {"world": self._world, **({"labels": self._labels} if self._path else {})}
        self.weights = dict.fromkeys(REASONING, 1.0)
        self.published = PUBLISHED

    def items(self) -> list[EvalItem]:
        """The reasoning tasks, unless others are named: those of knowledge are for models that were taught it.

        Of a folder of characters that were made up, its own.
        """
        tasks = self._tasks()
        self.notes = {}
        return [item for task in tasks for item in self._task_items(task)]

    def judge_maker(self, spec: JudgeSpec, *, device: str) -> JudgeMaker:
        """Exactly in the little world; by two questions to a reader, which are UniSandBox's about photographs."""
        if self._world == "shapes":
            if spec.kind == "exact":
                return exact_shapes_judge
            if words := [task for task in self._tasks() if task.partition(".")[0] in WORDS]:
                raise ValueError(f"got --judge {spec.kind} for {words[0]}, whose answers are words: expected exact")
            return reader_judge_maker(shapes_dialogue, {"questions": "counts in the little world"})
        if spec.kind == "exact":
            raise ValueError(f"got --judge exact for photos, which none can read: expected {NAMED_JUDGES}")
        texts = read_judge_texts(find_judge_folder(self.options.judge_prompts, self._path))
        protocol = {"questions": "UniSandBox", "sha256": hash_texts(texts)}
        return reader_judge_maker(lambda task: official_dialogue(task, texts), protocol)

    def _tasks(self) -> tuple[str, ...]:
        tasks = self._usual if self.options.tasks is None else tuple(dict.fromkeys(self.options.tasks))
        for task in tasks:
            if (task.partition(".")[0] if self._path else task) not in self._known:
                raise ValueError(f"got the task {task!r}: expected some of {', '.join(self._known)}")
        return tasks

    def _task_items(self, task: str) -> list[EvalItem]:
        options = self.options
        if self._path is None:
            asked = generated_questions(task, options.n or N_GENERATED, world=self._world, seed=options.seed)
        else:
            asked = [self._known_example(task, one) for one in self._file_questions(self._path, task)]
        return [question_item(self.NAME, task, one, seed=options.seed, think=options.think) for one in asked]

    def _known_example(self, task: str, one: ReasoningQuestion) -> AskedQuestion:
        """A question of a file, with its example in the little world."""
        if self._world != "shapes":
            return AskedQuestion(question=one)
        return AskedQuestion(question=one, example=shapes_example(task.partition(".")[0], one))

    def _file_questions(self, path: Path, task: str) -> list[ReasoningQuestion]:
        n = self.options.n
        questions = read_task(path, task)
        if self._labels == "corrected":
            questions, left_out = corrected(task, questions)
            if left_out:
                known = self.notes.get("left_out", {})
                self.notes["left_out"] = known | {f"{task}/{name}": why for name, why in left_out.items()}
        # a pair is one of n
        return questions if n is None else questions[: 2 * n if task in MAPPING else n]


def question_item(benchmark: str, task: str, asked: AskedQuestion, *, seed: int, think: bool) -> EvalItem:
    """A question as an item of a benchmark; the two of a pair are one unit. seed: of the run."""
    one = asked.question
    group = task.partition(".")[0]
    in_words = group in WORDS
    key = f"{group}/{one.id}_{one.side}" if one.side else f"{group}/{one.id}"
    return EvalItem(
        id=key,
        group=group,
        unit=one.id if one.side else "",
        prompt=one.question,
        seed=item_seed(seed, benchmark, key),
        think=think and not in_words,
        output="text" if in_words else "image",
        answer=one.answer,
        payload=asked.example,
    )
