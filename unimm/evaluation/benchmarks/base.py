"""What a benchmark is: items, how outputs are judged, how verdicts become scores, and what was published."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from unimm.evaluation.items import EvalItem
from unimm.evaluation.judges.base import Dialogue, ItemJudge, JudgeTask
from unimm.evaluation.judges.readers import JudgeSpec
from unimm.evaluation.scores import GroupScore, UnitScore, score_units, weighted_score

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


class Benchmark(ABC):
    """A benchmark, as one run asks for it."""

    NAME: ClassVar[str]
    # the options that it takes beside the seed
    TAKES: ClassVar[tuple[str, ...]]
    # kinds of judges that can judge it, the first unless another is asked for
    JUDGES: ClassVar[tuple[str, ...]]
    # how the items of one unit become one score: the mean, or 1 where all are 1
    UNIT: ClassVar[Literal["mean", "all"]] = "mean"
    # the least and the greatest score
    SCALE: ClassVar[tuple[float, float]] = (0.0, 1.0)
    # the name of the weighted mean of all groups, and the weights, which are equal unless given
    OVERALL: ClassVar[str | None] = None
    WEIGHTS: ClassVar[Mapping[str, float] | None] = None
    PUBLISHED: ClassVar[tuple[PublishedScores, ...]] = ()

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

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the items are from, in words."""

    @abstractmethod
    def items(self) -> list[EvalItem]:
        """What is asked. Raises ValueError for files that are missing or malformed."""

    @property
    def default_judge(self) -> str:
        """The judge of a run that names none."""
        return self.JUDGES[0]

    @property
    def default_batch(self) -> int:
        """Items at a time, unless a run says otherwise."""
        return 1

    def notes(self) -> dict[str, Any]:
        """What else the result should say."""
        return {}

    @abstractmethod
    def exact_judge(self) -> ItemJudge:
        """The judge that computes, or that no reader takes part in. Raises ValueError where there is none."""

    @abstractmethod
    def dialogue(self, task: JudgeTask) -> Dialogue:
        """The questions to a reader about one output."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What is written of those questions. Raises ValueError where they cannot be read."""

    def settings(self) -> dict[str, Any]:
        """The options that make this run what it is; where its files lie is none of them."""
        given = {name: getattr(self.options, name) for name in self.TAKES if name not in PLACES}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    def check_judge(self, spec: JudgeSpec) -> None:
        """Raise ValueError for a kind of judge that cannot judge this benchmark."""
        if spec.kind not in self.JUDGES:
            raise ValueError(f"got --judge {spec.kind} for {self.NAME}: expected {' or '.join(self.JUDGES)}")

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
            overall = weighted_score(groups, self.WEIGHTS or dict.fromkeys(groups, 1.0))
            if overall is not None:
                groups[self.OVERALL] = overall
        return groups


def choose(what: str, given: str | None, known: Sequence[str]) -> str:
    """What was given of those known, the first unless given. Raises ValueError for another. what: the option."""
    if given is None:
        return known[0]
    if given not in known:
        raise ValueError(f"got --{what} {given}: expected {' or '.join(known)}")
    return given
