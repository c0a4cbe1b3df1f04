"""The questions that UniSandBox's judge asks: its own text, read from the user's checkout, and how replies are read.

The text is third-party, under Apache-2.0, and scores can be compared only where it is the same word for word; so it is
not shipped. How replies are read follows eval_math.py, eval_mapping.py and eval_knowledge.py.
"""

import ast
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unimm.data.shapes import ImageGoal
from unimm.data.shapes.language import NUMBERS, plural
from unimm.evaluation.benchmarks.unisandbox.files import MAPPING, MATH
from unimm.evaluation.judges.base import Dialogue, JudgeQuestion, JudgeTask

# the limits of replies
LONG = 10240
KNOWLEDGE_CAPTION = 2048
KNOWLEDGE_VERDICT = 1024
_SCORE = re.compile(r"Score:\s*(YES|NO)", re.IGNORECASE)
_OBJECT = re.compile(r"Object:\s*(.+)")


@dataclass(frozen=True, kw_only=True)
class JudgeTexts:
    """The two texts of a task's judge; what the second one's fields are called."""

    first: str
    second: str
    seen: str
    expected: str


# file -> the names of its texts, and of the fields
TEXTS = {
    "eval_math.py": ("CAPTION_PROMPT", "EVALUATION_PROMPT_TEMPLATE", "caption", "expected_answer"),
    "eval_mapping.py": ("IDENTIFICATION_PROMPT", "EVALUATION_PROMPT_TEMPLATE", "identified_object", "expected_answer"),
    "eval_knowledge.py": ("CAPTION_PROMPT", "EVAL_PROMPT_TEMPLATE", "caption", "gt"),
}


def find_judge_folder(given: Path | None, items: Path | None) -> Path:
    """The folder eval of a checkout: where it is said to be, or above the benchmark's files. Raises ValueError."""
    places = [given] if given else list((items or Path()).resolve().parents) + ([items] if items else [])
    for place in places if given or items else []:
        for folder in (place, place / "eval"):
            if (folder / "eval_math.py").is_file():
                return folder
    raise ValueError(
        f"no eval/eval_math.py in {given or items or 'any place that was given'}: the questions of UniSandBox's judge are "
        "its own text, which is not shipped; give a checkout of github.com/PKU-YuanGroup/UniSandBox: --judge-prompts DIR"
    )


def read_judge_texts(folder: Path) -> dict[str, JudgeTexts]:
    """The texts of the judges, by their file. Raises ValueError, with the file and the name, for one that is missing."""
    return {name: _read_texts(folder / name, *texts) for name, texts in TEXTS.items()}


def _read_texts(path: Path, first: str, second: str, seen: str, expected: str) -> JudgeTexts:
    found = read_constants(path)
    for name in (first, second):
        if name not in found:
            raise ValueError(f"{path} has no text {name}: expected UniSandBox's own file")
    if missing := [field for field in (seen, expected) if f"{{{field}}}" not in found[second]]:
        raise ValueError(f"{second} in {path} has no {{{missing[0]}}}: expected UniSandBox's own file")
    return JudgeTexts(first=found[first], second=found[second], seen=seen, expected=expected)


def read_constants(path: Path) -> dict[str, str]:
    """The texts that a Python file assigns to names at its top; nothing of it is run."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no {path.name} in {path.parent}: expected UniSandBox's own file") from error
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; fetch it again") from error
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def hash_texts(texts: dict[str, JudgeTexts]) -> str:
    """The SHA-256 of all texts."""
    every = {name: [one.first, one.second] for name, one in texts.items()}
    return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()


# ---- dialogues


def official_dialogue(task: JudgeTask, texts: dict[str, JudgeTexts]) -> Dialogue:
    """What is seen, then whether it is what was expected, which is asked without the image."""
    group = task.item.group
    image = crop_black_border(task.load_image())
    if group in MATH:
        return _dialogue(task, image, texts["eval_math.py"], limits=(LONG, LONG), error="ERROR", read=str.strip)
    if group in MAPPING:
        return _dialogue(task, image, texts["eval_mapping.py"], limits=(LONG, LONG), error="ERROR", read=read_object)
    limits = (KNOWLEDGE_CAPTION, KNOWLEDGE_VERDICT)
    return _dialogue(task, image, texts["eval_knowledge.py"], limits=limits, error="REJECT", read=first_line)


def _dialogue(
    task: JudgeTask,
    image: Image.Image,
    texts: JudgeTexts,
    *,
    limits: tuple[int, int],
    error: str,
    read: Callable[[str], str],
) -> Dialogue:
    """error: what is seen, in capitals, that ends the dialogue at once: nothing there that can be right."""
    reply = yield JudgeQuestion(
        parts=(image, texts.first), max_tokens=limits[0], understood=lambda reply: bool(reply.strip())
    )
    seen = read(reply)
    if seen.upper() == error:
        return 0.0, f"the judge sees nothing that can be right: {seen}"
    question = texts.second.format(**{texts.seen: seen, texts.expected: task.item.answer})
    verdict = yield JudgeQuestion(
        parts=(question,), max_tokens=limits[1], understood=lambda reply: read_score(reply) is not None
    )
    score = read_score(verdict)
    assert score is not None
    return score, f"the judge sees {seen}"


def read_score(reply: str) -> float | None:
    """1 or 0 from "Score: YES" or "Score: NO" anywhere in a reply; None where it has neither."""
    match = _SCORE.search(reply)
    return None if match is None else float(match[1].upper() == "YES")


def read_object(reply: str) -> str:
    """What stands behind "Object:", or the whole reply where there is none."""
    match = _OBJECT.search(reply.strip())
    return (match[1] if match else reply).strip()


def first_line(reply: str) -> str:
    """The first line of a reply that is not empty."""
    return reply.strip().splitlines()[0].strip()


def crop_black_border(image: Image.Image) -> Image.Image:
    """The image without a border of pure black, as the original saves it; one that is all black as it is."""
    box = image.getbbox()
    return image.crop(box) if box else image


# ---- the little world

_NUMBER = re.compile(rf"\b(?:\d|{'|'.join(NUMBERS)})\b", re.IGNORECASE)


def shapes_dialogue(task: JudgeTask) -> Dialogue:
    """How many there are of the wanted things, and how many things at all; both must be the wanted number."""
    goal = task.item.payload.goal
    assert isinstance(goal, ImageGoal)
    image = task.load_image()
    first = goal.wants[0]
    counts = []
    for what in (plural(f"{first.colour} {first.shape}"), "shapes"):
        reply = yield JudgeQuestion(
            parts=(image, f"how many {what} are there?"),
            max_tokens=64,
            understood=lambda reply: read_number(reply) is not None,
        )
        counts.append(read_number(reply))
    right = counts == [len(goal.wants)] * 2
    return float(right), f"the judge counts {counts[0]} of {counts[1]}"


def read_number(reply: str) -> int | None:
    """The one number of a reply, in words or figures; None where there is none, or several."""
    found = {word.lower() for word in _NUMBER.findall(reply)}
    numbers = {NUMBERS.index(word) if word in NUMBERS else int(word) for word in found}
    return numbers.pop() if len(numbers) == 1 else None
