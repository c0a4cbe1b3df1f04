"""GenEval as `unimm eval` runs it: four images a prompt, judged by detectors."""

import json
from pathlib import Path
from typing import Any

from unimm.evaluation.benchmarks.base import Benchmark, BenchmarkOptions, JudgeMaker, PublishedScores
from unimm.evaluation.benchmarks.geneval.protocol import COLOURS, RELATIONS, TAGS
from unimm.evaluation.items import EvalItem, item_seed
from unimm.evaluation.judges.base import ItemJudge
from unimm.evaluation.judges.readers import JudgeSpec, Reader

FILE = "evaluation_metadata.jsonl"
IMAGES = 4  # of each prompt
SOURCE = "the models' papers, by the detectors of GenEval"


class GenEvalBenchmark(Benchmark):
    """553 prompts of six tags; rewritten prompts of the same clauses are another file."""

    NAME = "geneval"
    TAKES = ("items", "n", "think", "tasks")
    JUDGES = ("detector",)
    OVERALL = "overall"

    def __init__(self, options: BenchmarkOptions) -> None:
        super().__init__(options)
        if options.items in (None, "generated"):
            raise ValueError(f"got no --items for geneval: expected the path of its {FILE}")
        given = Path(str(options.items)).expanduser()
        places = [given / FILE, given / "prompts" / FILE] if given.is_dir() else [given]
        self._file = next((place for place in places if place.is_file()), places[0])
        self.weights = dict.fromkeys(TAGS, 1.0)
        self.published = tuple(
            PublishedScores(model=model, scores={"overall": score}, source=SOURCE)
            for model, score in (
                *(("BAGEL, rewritten prompts", 0.88), ("UniWorld, rewritten prompts", 0.84), ("BAGEL", 0.82)),
                *(("Janus-Pro-7B", 0.80), ("UniWorld", 0.80), ("MetaQuery-XL", 0.80), ("Show-o", 0.68)),
                *(("Emu3", 0.66), ("Janus", 0.61)),
            )
        )

    def items(self) -> list[EvalItem]:
        """Four images of each prompt, or of the first n of each tag. They are named as the original's folders are."""
        tags = TAGS if self.options.tasks is None else self.options.tasks
        if unknown := [tag for tag in tags if tag not in TAGS]:
            raise ValueError(f"got the task {unknown[0]!r}: expected some of {', '.join(TAGS)}")
        n: dict[str, int] = dict.fromkeys(tags, 0)
        items: list[EvalItem] = []
        for index, metadata in enumerate(read_metadata(self._file)):
            tag = metadata["tag"]
            if tag not in n or n[tag] == self.options.n:
                continue
            n[tag] += 1
            items += [self._item(index, k, metadata) for k in range(IMAGES)]
        # those of one tag together
        return sorted(items, key=lambda item: tags.index(item.group))

    def judge_maker(self, spec: JudgeSpec, *, device: str) -> JudgeMaker:
        """A detector and a CLIP: those that GenEval names, or "detector:MASK2FORMER,CLIP"."""
        try:
            import transformers  # noqa: F401  # found missing before hours of generation

            from unimm.evaluation.benchmarks.geneval import detector
        except ImportError as error:
            raise ValueError("the detectors of geneval need transformers: pip install 'unimm[eval]'") from error
        names = spec.where.split(",") if spec.where else [detector.DETECTOR, detector.CLIP]
        if len(names) != 2 or not all(names):
            raise ValueError(
                f"got --judge detector:{spec.where}: expected detector:MASK2FORMER,CLIP, two folders or hub ids"
            )

        def make(reader: Reader | None) -> ItemJudge:
            return detector.DetectorJudge(
                detector.ObjectDetector.from_pretrained(names[0], device),
                detector.ColourNamer.from_pretrained(names[1], device),
                models=(names[0], names[1]),
            )

        return make

    def _item(self, index: int, k: int, metadata: dict[str, Any]) -> EvalItem:
        key = f"{index:05}/samples/{k:05}"
        return EvalItem(
            id=key,
            group=metadata["tag"],
            unit=f"{index:05}",
            prompt=metadata["prompt"],
            seed=item_seed(self.options.seed, self.NAME, key),
            think=self.options.think,
            answer=json.dumps({name: metadata[name] for name in ("include", "exclude") if name in metadata}),
            payload=metadata,
        )


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file with what their images must hold. Raises ValueError, with file and line, for others."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; expected GenEval's {FILE}") from error
    return [
        parse_metadata(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()
    ]


def parse_metadata(line: bytes, place: str) -> dict[str, Any]:
    """One prompt's metadata."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}, is no JSON: {error}; fetch the file again") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or row.get("tag") not in TAGS:
        raise ValueError(f"{place}, holds {row!r:.80}: expected a prompt and a tag of {', '.join(TAGS)}")
    if not row.get("include"):
        raise ValueError(f"{place}, includes nothing: expected at least one object")
    for name in ("include", "exclude"):
        for i, clause in enumerate(row.get(name, [])):
            if fault := clause_fault(clause, i):
                raise ValueError(f"{place}, {name} {i + 1}: {fault}")
    return row


def clause_fault(clause: Any, index: int) -> str:
    """What is wrong of a clause, the index-th of its prompt; nothing where it is as it should be."""
    if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
        return f"got {clause!r:.80}, expected an object with a class"
    count = clause.get("count")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        return f"got count {count!r}, expected 1 or more"
    if clause.get("color", COLOURS[0]) not in COLOURS:
        return f"got color {clause['color']!r}, expected one of {', '.join(COLOURS)}"
    position = clause.get("position", [RELATIONS[0], index - 1])
    if not isinstance(position, list) or len(position) != 2 or position[0] not in RELATIONS:
        return f"got position {position!r}, expected one of {', '.join(RELATIONS)} and the number of a clause"
    target = position[1]
    # a clause stands in relation to an earlier one
    if "position" in clause and (not isinstance(target, int) or not 0 <= target < index):
        return f"got the target {target!r} of a position, expected an earlier clause"
    return ""
