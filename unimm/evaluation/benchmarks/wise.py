"""WISE (arXiv 2503.07265): prompts that name something by what is known of it; as published in 2025, and its Verified
version of 2026."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimm.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkOptions,
    JudgeMaker,
    PublishedScores,
    reader_judge_maker,
)
from unimm.evaluation.items import EvalItem, item_seed
from unimm.evaluation.judges.base import Dialogue, JudgeQuestion, JudgeTask
from unimm.evaluation.judges.message_files import MessageTemplate, read_message_template
from unimm.evaluation.judges.readers import JudgeSpec

FIELDS = ("Prompt", "Explanation")
NAMES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
# share of each score in an image's WiScore, of 2
WISCORE = {"consistency": 0.7, "realism": 0.2, "aesthetic quality": 0.1}
_NAMED = re.compile(r"(Consistency|Realism|Aesthetic Quality)[\s*:\uff1a]*([0-2])\b", re.IGNORECASE)
_THREE = re.compile(r"\D*([0-2])\D+([0-2])\D+([0-2])\D*")
_ONE = re.compile(r"Score[\s*:\uff1a]*([01])\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class WiseVersion:
    """A version: its files, the last id of each category, the weights of the overall score, its judge."""

    name: str
    suffix: str
    last_ids: Mapping[str, int]
    weights: Mapping[str, float]
    script: str
    max_tokens: int

    def category(self, prompt_id: int) -> str | None:
        """The category of an id; None for one that is none of its."""
        return next((name for name, last in self.last_ids.items() if 1 <= prompt_id <= last), None)


LEGACY = WiseVersion(
    name="legacy",
    suffix="",
    last_ids={"culture": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000},
    weights={"culture": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1},
    script="gpt_eval.py",
    max_tokens=2000,
)
VERIFIED = WiseVersion(
    name="verified",
    suffix="_verified",
    last_ids={"culture": 400, "time": 520, "space": 640, "biology": 760, "physics": 880, "chemistry": 1000},
    weights={"culture": 0.4, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12},
    script="vllm_eval.py",
    max_tokens=500,
)
CATEGORIES = tuple(LEGACY.last_ids)


def _legacy_row(model: str, *scores: float) -> PublishedScores:
    named = dict(zip((*CATEGORIES, "overall"), scores, strict=True))
    return PublishedScores(model=model, scores=named, source="WISE's table, by GPT-4o-2024-05-13")


def _verified_row(model: str, overall: float, *, think: bool = False) -> PublishedScores:
    source = "WISE Verified's table, by Qwen3.5-35B-A3B"
    return PublishedScores(model=model, scores={"overall": overall}, think=think, source=source)


PUBLISHED = {
    "legacy": (
        _legacy_row("UniWorld-V1", 0.53, 0.55, 0.73, 0.45, 0.59, 0.41, 0.55),
        _legacy_row("MetaQuery-XL", 0.56, 0.55, 0.62, 0.49, 0.63, 0.41, 0.55),
        _legacy_row("BAGEL", 0.44, 0.55, 0.68, 0.44, 0.60, 0.39, 0.52),
        _legacy_row("Liquid", 0.38, 0.42, 0.53, 0.36, 0.47, 0.30, 0.41),
        _legacy_row("Harmon-1.5B", 0.38, 0.48, 0.52, 0.37, 0.44, 0.29, 0.41),
        _legacy_row("Emu3", 0.34, 0.45, 0.48, 0.41, 0.45, 0.27, 0.39),
        _legacy_row("Janus-Pro-7B", 0.30, 0.37, 0.49, 0.36, 0.42, 0.26, 0.35),
        _legacy_row("show-o-512", 0.28, 0.40, 0.48, 0.30, 0.46, 0.30, 0.35),
        _legacy_row("VILA-U-256", 0.26, 0.33, 0.37, 0.35, 0.39, 0.23, 0.31),
        _legacy_row("Orthus-7B-instruct", 0.23, 0.31, 0.38, 0.28, 0.31, 0.20, 0.27),
        _legacy_row("Janus-1.3B", 0.16, 0.26, 0.35, 0.28, 0.30, 0.14, 0.23),
        _legacy_row("JanusFlow-1.3B", 0.13, 0.26, 0.28, 0.20, 0.19, 0.11, 0.18),
    ),
    "verified": (
        _verified_row("BAGEL", 0.628, think=True),
        _verified_row("Qwen-Image", 0.510),
        _verified_row("UniWorld-V1", 0.426),
        _verified_row("BAGEL", 0.352),
        _verified_row("Janus-Pro-7B", 0.334),
        _verified_row("Janus-1.3B", 0.273),
        _verified_row("Janus-Pro-1B", 0.265),
    ),
}


class WiseBenchmark(Benchmark):
    """WISE in one of its versions, by the files that are given."""

    NAME = "wise"
    TAKES = ("items", "n", "think", "tasks", "judge_prompts")
    JUDGES = ("vlm", "openai")
    OVERALL = "overall"

    def __init__(self, options: BenchmarkOptions) -> None:
        super().__init__(options)
        self._files = find_files(options.items)
        self._version = VERIFIED if is_verified(self._files) else LEGACY
        self.source = f"released files, {self._version.name}"
        self.default_judge = None
        self.resolved = {"version": self._version.name, "files": [file.name for file in self._files]}
        self.weights = self._version.weights
        self.published = PUBLISHED[self._version.name]
        if self._version is VERIFIED:
            # its judge answers at once
            self.endpoint_options = {"chat_template_kwargs": {"enable_thinking": False}}

    def items(self) -> list[EvalItem]:
        """All prompts, or the first n of each category."""
        wanted = CATEGORIES if self.options.tasks is None else self.options.tasks
        if unknown := [task for task in wanted if task not in CATEGORIES]:
            raise ValueError(f"got the task {unknown[0]!r}: expected some of {', '.join(CATEGORIES)}")
        found: dict[str, list[EvalItem]] = {task: [] for task in wanted}
        for row, place in (pair for file in self._files for pair in read_objects(file)):
            item = self._item(row, place)
            if item.group in found and (self.options.n is None or len(found[item.group]) < self.options.n):
                found[item.group].append(item)
        return [item for some in found.values() for item in some]

    def judge_maker(self, spec: JudgeSpec, *, device: str) -> JudgeMaker:
        """One question with the image, which is WISE's own."""
        script = find_script(self.options.judge_prompts, self._files[0], self._version.script)
        template = read_message_template(script, FIELDS)
        protocol = {"questions": f"WISE, {self._version.name}", "sha256": template.sha256}
        return reader_judge_maker(lambda task: wise_dialogue(task, template, self._version), protocol)

    def _item(self, row: dict[str, Any], place: str) -> EvalItem:
        for name in FIELDS:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"{place}, has {name} {row.get(name)!r:.80}: expected a text")
        number = row.get("prompt_id")
        category = self._version.category(number) if isinstance(number, int) else None
        if category is None:
            raise ValueError(f"{place}, has the prompt_id {number!r}: expected 1 to 1000")
        key = f"{category}/{number}"
        return EvalItem(
            id=key,
            group=category,
            prompt=row["Prompt"],
            seed=item_seed(self.options.seed, self.NAME, str(number)),
            think=self.options.think,
            answer=row["Explanation"],
        )


def find_files(items: str | None) -> list[Path]:
    """The files of a folder, or those that are named with commas between. Raises ValueError where there are none."""
    if items in (None, "generated"):
        raise ValueError("got no --items for wise: expected the path of its folder data or data_verified, or of files")
    paths = [Path(one).expanduser() for one in str(items).split(",")]
    if len(paths) > 1 or not paths[0].is_dir():
        if missing := [path for path in paths if not path.is_file()]:
            raise ValueError(f"no file {missing[0]}: expected one of WISE's, or its folder data or data_verified")
        return paths
    for folder in (paths[0], paths[0] / "data_verified", paths[0] / "data"):
        for version in (VERIFIED, LEGACY):
            files = [folder / f"{name}{version.suffix}.json" for name in NAMES]
            if any(file.is_file() for file in files):
                if missing := [file for file in files if not file.is_file()]:
                    raise ValueError(f"no {missing[0].name} in {folder}: expected all three files of WISE")
                return files
    raise ValueError(f"no {NAMES[0]}.json in {paths[0]}: expected WISE's folder data or data_verified")


def is_verified(files: list[Path]) -> bool:
    """Whether files are of the Verified version. Raises ValueError for files of both."""
    marks = {"verified" in f"{file.parent.name}/{file.name}" or file.name == "merge.json" for file in files}
    if len(marks) > 1:
        raise ValueError("got files of both versions of WISE: expected those of one")
    return marks.pop()


def find_script(given: Path | None, file: Path, name: str) -> Path:
    """The script whose questions the judge is asked. Raises ValueError, with what to do, where there is none."""
    if given is not None and given.is_file():
        return given
    for folder in [given] if given else file.resolve().parents:
        for place in (folder / name, folder / "WISE_legacy" / name):
            if place.is_file():
                return place
    raise ValueError(
        f"no {name} in {given or file.parent} or above: the questions of WISE's judge are its own text, which is not "
        "shipped; give a checkout of github.com/PKU-YuanGroup/WISE, or its script: --judge-prompts PATH"
    )


def read_objects(path: Path) -> list[tuple[dict[str, Any], str]]:
    """The objects of a JSON list, each with its place."""
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; fetch it again") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds {rows!r:.80}: expected a list of prompts")
    placed = [(row, f"{path}, prompt {number}") for number, row in enumerate(rows, start=1)]
    for row, place in placed:
        if not isinstance(row, dict):
            raise ValueError(f"{place}, is {row!r:.80}: expected an object with Prompt, Explanation and prompt_id")
    return placed


def wise_dialogue(task: JudgeTask, template: MessageTemplate, version: WiseVersion) -> Dialogue:
    """One question; its reply is read by the version's rules."""
    read = read_wiscore if version is LEGACY else read_verified
    values = {"Prompt": task.item.prompt, "Explanation": task.item.answer}
    reply = yield JudgeQuestion(
        parts=template.fill(values, task.load_image()),
        max_tokens=version.max_tokens,
        system=template.system or None,
        understood=lambda reply: read(reply) is not None,
    )
    score = read(reply)
    assert score is not None
    return score, " ".join(reply.split())[:80]


def read_wiscore(reply: str) -> float | None:
    """The WiScore, 0 to 1, of a reply: three lines with their names, or three bare digits; None for another."""
    named = {name.lower(): int(digit) for name, digit in _NAMED.findall(reply)}
    if not named and (three := _THREE.fullmatch(reply)):
        named = dict(zip(WISCORE, map(int, three.groups()), strict=True))
    if named.keys() != WISCORE.keys():
        return None
    # in hundredths: 0.7 + 0.2 + 0.1 is 1 to the bit
    return sum(round(100 * WISCORE[name]) * score for name, score in named.items()) / 200


def read_verified(reply: str) -> float | None:
    """1 or 0 of "Score: 1", or of a bare digit; None for another reply."""
    match = _ONE.search(reply)
    if match is not None:
        return float(match[1])
    return float(reply.strip()) if reply.strip() in ("0", "1") else None
