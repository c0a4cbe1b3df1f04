"""What a benchmark is: items, how outputs are judged, how verdicts become scores, and what was published."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from unimm.evaluation.items import EvalItem
from unimm.evaluation.judges.base import Dialogue, ItemJudge, JudgeTask
from unimm.evaluation.judges.readers import JudgeSpec, Reader, ReaderJudge, parse_judge
from unimm.evaluation.scores import GroupScore, UnitScore, score_units, weighted_score

NAMED_JUDGES = "vlm:MODEL or openai:URL"
# options that say where something lies
PLACES = ("items", "judge_prompts", "images")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What a run asks of a benchmark; None where it does not say.

    items: "generated", or the path of the benchmark's files. labels: "official" or "corrected". n: items a task.
    tasks: some of the benchmark's. world: of generated items, "shapes" or "photos". judge_prompts: where the judge's
    questions are read from. images: the folder of input images. supports_thinking: whether the model can think.
    """

    items: str | None = None
    labels: str | None = None
    n: int | None = None
    seed: int = 1
    think: bool = False
    tasks: tuple[str, ...] | None = None
    world: str | None = None
    judge_prompts: Path | None = None
    images: Path | None = None
    supports_thinking: bool = False


@dataclass(frozen=True, kw_only=True)
class PublishedScores:
    """A published row: a model, whether it thought first, and its score of each group."""

    model: str
    scores: Mapping[str, float]
    think: bool = False
    source: str = ""


# of a reader where one is asked, or of nothing: a judge
JudgeMaker = Callable[[Reader | None], ItemJudge]


class Benchmark(ABC):
    """A benchmark, as one run asks for it. What is written here is final."""

    NAME: ClassVar[str]
    # the options that it takes beside the seed
    TAKES: ClassVar[tuple[str, ...]]
    # kinds of judges that can judge it
    JUDGES: ClassVar[tuple[str, ...]]
    # how the items of one unit become one score: the mean, or 1 where all are 1
    UNIT: ClassVar[Literal["mean", "all"]] = "mean"
    # the least and the greatest score
    SCALE: ClassVar[tuple[float, float]] = (0.0, 1.0)
    # the name of the weighted mean of all groups
    OVERALL: ClassVar[str | None] = None

    # what a subclass may set for a run:
    source: str  # where the items are from, in words
    default_judge: str | None  # of a run that names none; None where it must
    batch: int  # items at a time, unless a run says otherwise
    resolved: dict[str, Any]  # options that were not given, as they are taken
    notes: dict[str, Any]  # what else the result should say
    weights: Mapping[str, float]  # of the groups in the overall score, which is left out where one is missing
    published: Sequence[PublishedScores]
    endpoint_options: dict[str, Any] | None  # of an endpoint, for this benchmark's judge

    def __init__(self, options: BenchmarkOptions) -> None:
        """Raises ValueError for options that this benchmark does not have."""
        self.options = options
        unset = BenchmarkOptions()
        always = ("seed", "supports_thinking")
        for name in (field.name for field in fields(options)):
            if name not in (*always, *self.TAKES) and getattr(options, name) != getattr(unset, name):
                flags = ", ".join(f"--{one.replace('_', '-')}" for one in self.TAKES)
                raise ValueError(f"got --{name.replace('_', '-')} for {self.NAME}: it takes --seed, {flags}")
        if options.n is not None and options.n < 1:
            raise ValueError(f"got n {options.n}: expected at least 1")
        self.source = "released files"
        self.default_judge = self.JUDGES[0]
        self.batch = 1
        self.resolved = {}
        self.notes = {}
        self.weights = {}
        self.published = ()
        self.endpoint_options = None

    @abstractmethod
    def items(self) -> list[EvalItem]:
        """What is asked. Raises ValueError for files that are missing or malformed."""

    @abstractmethod
    def judge_maker(self, spec: JudgeSpec, *, device: str) -> JudgeMaker:
        """What makes the judge, of a kind of JUDGES, once it is needed.

        Raises ValueError, now, for what can be known to be wrong, such as questions that cannot be read. device: of a
        judge's own models.
        """

    def settings(self) -> dict[str, Any]:
        """The options that make this run what it is; where its files lie is none of them."""
        given = {name: getattr(self.options, name) for name in self.TAKES if name not in PLACES}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
        return plain | self.resolved

    def judge_spec(self, name: str | None) -> JudgeSpec:
        """The judge of that name, or the usual one. Raises ValueError for one that cannot judge this benchmark."""
        if name is None and self.default_judge is None:
            raise ValueError(f"got no --judge for {self.NAME}, {self.source}: expected {NAMED_JUDGES}")
        spec = parse_judge(name or self.default_judge or "")
        if spec.kind not in self.JUDGES:
            raise ValueError(f"got --judge {spec.kind} for {self.NAME}: expected {' or '.join(self.JUDGES)}")
        return spec

    def unit_scores(self, items: Sequence[EvalItem], values: Mapping[str, float | None]) -> list[UnitScore]:
        """The scores of the items' units, in order, from those of items, which are None where the judge failed."""
        by_unit: dict[str, list[EvalItem]] = {}
        for item in items:
            by_unit.setdefault(item.unit_id, []).append(item)
        return [self._unit_score(name, some, [values[one.id] for one in some]) for name, some in by_unit.items()]

    def _unit_score(self, name: str, items: Sequence[EvalItem], values: Sequence[float | None]) -> UnitScore:
        judged = [value for value in values if value is not None]
        value: float | None = None
        if self.UNIT == "all":
            # one that is wrong decides, whatever the judge would have said of the others
            wrong = any(one < 1 for one in judged)
            value = 0.0 if wrong else 1.0 if len(judged) == len(values) else None
        elif len(judged) == len(values):
            value = sum(judged) / len(judged)
        binary = all(one in (0, 1) for one in judged)
        return UnitScore(id=name, group=items[0].group, value=value, n_items=len(items), binary=binary)

    def scores(self, units: Sequence[UnitScore]) -> dict[str, GroupScore]:
        """The score of each group, in order, and of all, where every group has one."""
        groups = {
            group: score_units([one for one in units if one.group == group], scale=self.SCALE)
            for group in dict.fromkeys(one.group for one in units)
        }
        if self.OVERALL is not None and len(groups) > 1:
            overall = weighted_score(groups, self.weights or dict.fromkeys(groups, 1.0))
            if overall is not None:
                groups[self.OVERALL] = overall
        return groups


def reader_judge_maker(dialogue: Callable[[JudgeTask], Dialogue], protocol: dict[str, Any]) -> JudgeMaker:
    """What makes a judge of a reader: the dialogue with it, and what is written of its questions."""

    def make(reader: Reader | None) -> ItemJudge:
        assert reader is not None, "a reader is there where its kind of judge was asked for"
        return ReaderJudge(reader, dialogue, protocol=protocol)

    return make


def choose(what: str, given: str | None, known: Sequence[str]) -> str:
    """What was given of those known, the first unless given. Raises ValueError for another. what: the option."""
    if given is None:
        return known[0]
    if given not in known:
        raise ValueError(f"got --{what} {given}: expected {' or '.join(known)}")
    return given
