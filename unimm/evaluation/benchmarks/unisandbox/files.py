"""UniSandBox's own files: questions read from the user's copy, and questions of ours written in their format.

test_reasoning/math_K.jsonl       {"Question", "Answer", "id"}
test_reasoning/mappingK.jsonl     {"ID", "Question_A", "Answer"}, and the same ID with Question_B
test_knowledge/NAME.jsonl         {"ID", "Question", "Answer"}: what NAME looks like, and likes
test_knowledge/NAME_NAME.jsonl    the same: which of the two likes something
test_words/...                    the same in words, of characters of the little world alone (`unimm data knowledge`)
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unimm.checkpoint.atomic import atomic_file
from unimm.checkpoint.json_files import json_lines
from unimm.data.reasoning.questions import ReasoningQuestion

LEVELS = (1, 2, 3)
MATH = tuple(f"math{level}" for level in LEVELS)
MAPPING = tuple(f"mapping{level}" for level in LEVELS)
KNOWLEDGE = ("forward", "inverse")
# what a model that was taught knowledge says of it; UniSandBox has no such files
WORDS = ("words_forward", "words_inverse")
TASKS = (*MATH, *MAPPING, *KNOWLEDGE)
FOLDERS = ("", "benchmark", "test_reasoning", "benchmark/test_reasoning")
# task -> the folder of its files
KNOWLEDGE_FOLDERS = {**dict.fromkeys(KNOWLEDGE, "test_knowledge"), **dict.fromkeys(WORDS, "test_words")}


def file_name(task: str) -> str:
    """The file of a level, which is written with and without an underscore."""
    return f"math_{task[-1]}.jsonl" if task in MATH else f"{task}.jsonl"


def read_task(path: Path, task: str) -> list[ReasoningQuestion]:
    """The questions of a task, such as math2, mapping1, forward, forward.NAME or inverse.NAME_NAME.

    path: a checkout of UniSandBox, its folder benchmark, or the folder with the file itself. Raises ValueError for a
    missing file, and, with file and line, for what is no question.
    """
    kind, _, who = task.partition(".")
    if kind in KNOWLEDGE_FOLDERS:
        return [question for file in _knowledge_files(path, kind, who) for question in _knowledge(file)]
    if task in MATH:
        return [_question(row, place, "Question") for row, place in read_lines(find_file(path, file_name(task)))]
    return _mapping(find_file(path, file_name(task)))


def find_file(path: Path, name: str, *, folders: Sequence[str] = FOLDERS) -> Path:
    """A file of the benchmark below a path. Raises ValueError where there is none."""
    places = [path / folder / name for folder in folders]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"no {name} in {path}: expected a checkout of UniSandBox, its folder benchmark, or --items generated"
        )
    return found


def _knowledge_files(path: Path, kind: str, who: str) -> list[Path]:
    below = KNOWLEDGE_FOLDERS[kind]
    folders = (below, f"benchmark/{below}", "")
    if who:
        return [find_file(path, f"{who}.jsonl", folders=folders)]
    files = sorted(file for folder in folders for file in (path / folder).glob("*.jsonl"))
    # one name, or two
    fitting = [file for file in files if file.stem[0].isupper() and ("_" in file.stem) == kind.endswith("inverse")]
    if not fitting:
        raise ValueError(f"no questions about knowledge in {path}: expected {below} with its files")
    return fitting


def read_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file of JSON lines, each with its place: the file and the line. Empty lines are left out."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}, is no JSON: {error}; fetch the file again") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}, holds {row!r:.80}: expected an object with a question and its answer")
        yield row, place


def _question(row: dict[str, Any], place: str, key: str, side: str = "") -> ReasoningQuestion:
    name = row.get("id", row.get("ID"))
    texts = {key: row.get(key), "Answer": row.get("Answer")}
    for field, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}, has {field} {text!r:.80}: expected a text")
    if isinstance(name, bool) or not isinstance(name, int | str) or not str(name).isalnum():
        raise ValueError(f"{place}, has the id {name!r}: expected a number, under id or ID")
    return ReasoningQuestion(id=str(name), question=texts[key] or "", answer=texts["Answer"] or "", side=side)


def _mapping(path: Path) -> list[ReasoningQuestion]:
    sides: dict[str, dict[str, ReasoningQuestion]] = {}
    for row, place in read_lines(path):
        keys = [key for key in ("Question_A", "Question_B") if key in row]
        if len(keys) != 1:
            raise ValueError(f"{place}, has {' and '.join(keys) or 'no question'}: expected Question_A or Question_B")
        question = _question(row, place, keys[0], keys[0][-1])
        if question.side in sides.setdefault(question.id, {}):
            raise ValueError(f"{place}, is a second {keys[0]} of ID {question.id}: expected one")
        sides[question.id][question.side] = question
    if alone := [name for name, some in sides.items() if len(some) < 2]:
        raise ValueError(f"{path} has one question of ID {alone[0]}: expected Question_A and Question_B")
    return [some[side] for some in sides.values() for side in "AB"]


def _knowledge(path: Path) -> list[ReasoningQuestion]:
    found = [_question(row, place, "Question") for row, place in read_lines(path)]
    return [ReasoningQuestion(id=f"{path.stem}/{one.id}", question=one.question, answer=one.answer) for one in found]


def write_task(folder: Path, task: str, questions: Sequence[ReasoningQuestion]) -> Path:
    """Write questions in the format of the level's file, below `folder`/test_reasoning; returns the file's path."""
    path = folder / "test_reasoning" / file_name(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"ID": one.id, f"Question_{one.side}": one.question, "Answer": one.answer}
        if one.side
        else {"Question": one.question, "Answer": one.answer, "id": one.id}
        for one in questions
    ]
    with atomic_file(path) as partial:
        partial.write_text(json_lines(rows), encoding="utf-8")
    return path
