"""ImgEdit's basic set (arXiv 2505.20275): edits of nine types, each given three scores of 1 to 5 by a judge that sees the
image before and after."""

import hashlib
import json
import re
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
from unimm.evaluation.judges.readers import JudgeSpec

FILE = "basic_edit.json"
PROMPT_FIELD = "<edit_prompt>"
N_SCORES = 3
# the original sets no limit
MAX_TOKENS = 2048
# a line such as "Prompt Compliance: 4", whatever marks stand around
_SCORE = re.compile(r"^[^\w\n]*[A-Za-z][^:\n]*:[\s*]*([1-5])[\s*.]*$", re.MULTILINE)


class ImgEditBenchmark(Benchmark):
    """Basic edits; a type's score is the mean of its items, the overall one that of the types."""

    NAME = "imgedit"
    TAKES = ("items", "n", "think", "tasks", "images", "judge_prompts")
    JUDGES = ("vlm", "openai")
    SCALE = (1.0, 5.0)
    OVERALL = "overall"

    def __init__(self, options: BenchmarkOptions) -> None:
        super().__init__(options)
        if options.items in (None, "generated"):
            raise ValueError(f"got no --items for imgedit: expected the path of its {FILE}")
        given = Path(str(options.items)).expanduser()
        self._file = given / FILE if given.is_dir() else given
        self._images = options.images or self._file.parent
        self.default_judge = None
        self.published = (PublishedScores(model="UniWorld-V1", scores={"overall": 3.37}, source="UniWorld's paper"),)

    def items(self) -> list[EvalItem]:
        """All edits, or the first n of each type."""
        edits = read_edits(self._file)
        types = list(dict.fromkeys(edit["edit_type"] for edit in edits.values()))
        wanted = types if self.options.tasks is None else self.options.tasks
        if unknown := [task for task in wanted if task not in types]:
            raise ValueError(f"got the task {unknown[0]!r}: expected some of {', '.join(types)}")
        # without one of the types there is no overall score
        self.weights = dict.fromkeys(types, 1.0)
        found: dict[str, list[EvalItem]] = {task: [] for task in wanted}
        for key, edit in edits.items():
            some = found.get(edit["edit_type"])
            if some is not None and (self.options.n is None or len(some) < self.options.n):
                some.append(self._item(key, edit))
        return [item for some in found.values() for item in some]

    def judge_maker(self, spec: JudgeSpec, *, device: str) -> JudgeMaker:
        """One question with both images, which is ImgEdit's own, by the type of the edit."""
        questions = read_questions(self.options.judge_prompts, self._file)
        text = json.dumps(questions, sort_keys=True)
        protocol = {"questions": "ImgEdit", "sha256": hashlib.sha256(text.encode()).hexdigest()}
        missing = {item.group for item in self.items()} - questions.keys()
        if missing:
            raise ValueError(
                f"the judge has no question for the type {min(missing)}: expected ImgEdit's own prompts.json"
            )
        return reader_judge_maker(lambda task: imgedit_dialogue(task, questions[task.item.group]), protocol)

    def _item(self, key: str, edit: dict[str, str]) -> EvalItem:
        image = self._images / edit["id"]
        if not image.is_file():
            raise ValueError(f"no image {edit['id']} in {self._images}, for {key}: give their folder with --images DIR")
        return EvalItem(
            id=f"{edit['edit_type']}/{key}",
            group=edit["edit_type"],
            prompt=edit["prompt"],
            seed=item_seed(self.options.seed, self.NAME, key),
            images=(image,),
            think=self.options.think,
            answer=edit["prompt"],
        )


def read_edits(path: Path) -> dict[str, dict[str, str]]:
    """The edits of a file {key: {"id": image, "prompt", "edit_type"}}. Raises ValueError, with the key, for others."""
    edits = _read_object(path, "edits")
    for key, edit in edits.items():
        for name in ("id", "prompt", "edit_type"):
            if not isinstance(edit, dict) or not isinstance(edit.get(name), str) or not edit[name].strip():
                got = edit.get(name) if isinstance(edit, dict) else edit
                raise ValueError(f"{path}, edit {key}, has {name} {got!r:.80}: expected a text")
    return edits


def read_questions(given: Path | None, file: Path) -> dict[str, str]:
    """The judge's question for each type of edit: prompts.json, which is ImgEdit's own. Raises ValueError."""
    places = [given, given / "prompts.json"] if given else [file.parent / "prompts.json"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"no prompts.json in {given or file.parent}: the questions of ImgEdit's judge are its own text, which is not "
            "shipped; give its file: --judge-prompts FILE"
        )
    questions = _read_object(found, "questions")
    for name, question in questions.items():
        if not isinstance(question, str) or PROMPT_FIELD not in question:
            raise ValueError(f"{found} has {question!r:.80} for {name}: expected a text with {PROMPT_FIELD}")
    return questions


def _read_object(path: Path, what: str) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; expected ImgEdit's {what}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; fetch it again") from error
    if not isinstance(contents, dict) or not contents:
        raise ValueError(f"{path} holds {contents!r:.80}: expected an object of {what}")
    return contents


def imgedit_dialogue(task: JudgeTask, question: str) -> Dialogue:
    """One question about the image before and the image after."""
    (before,) = task.item.load_images()
    text = question.replace(PROMPT_FIELD, task.item.prompt)
    reply = yield JudgeQuestion(
        parts=(text, before, task.load_image()),
        max_tokens=MAX_TOKENS,
        understood=lambda reply: read_scores(reply) is not None,
    )
    scores = read_scores(reply)
    assert scores is not None
    return sum(scores) / N_SCORES, " ".join(map(str, scores))


def read_scores(reply: str) -> list[int] | None:
    """The three scores of 1 to 5 in a reply, each behind a colon at the end of a line; None for more or fewer."""
    scores = [int(digit) for digit in _SCORE.findall(reply)]
    return scores if len(scores) == N_SCORES else None
