"""Who decides what is trained on. The model as its own verifier is asked about each image that it generated, and never
shown the right answer."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from unimm.data.shapes.language import NUMBERS, plural
from unimm.data.shapes.world import COLOURS, SHAPES
from unimm.evaluation.benchmarks.unisandbox.judge_questions import read_number
from unimm.evaluation.generating import describe_weights
from unimm.evaluation.judges.base import Dialogue, ExactJudge, ItemJudge, JudgeQuestion, JudgeTask, Verdict
from unimm.evaluation.judges.readers import ModelReader, ReaderJudge, UnderstandingModel

# tokens of a reply about a photograph, as in UniSandBox's data_filter.py
PHOTO_TOKENS = 800
PHOTO_QUESTION = """Somebody asked for this image: {prompt}

First work out what was asked for: which object, and how many of it. Then look at the image: name what it shows and count it.
The image is right only if it shows that object and no other, exactly as many of it, each whole and easy to recognise.
End with one line, which is either
Final Answer: YES
or
Final Answer: NO"""


def self_judge(model: UnderstandingModel, world: str) -> ItemJudge:
    """The judge that asks the model itself."""
    reader = ModelReader(model, "self", weights=describe_weights(model))
    dialogue: Callable[[JudgeTask], Dialogue]
    if world == "shapes":
        dialogue = shapes_verification
        protocol = {"questions": "counts of what its own reasoning concludes"}
    else:
        dialogue = photo_verification
        protocol = {"questions": PHOTO_QUESTION}
    return ReaderJudge(reader, dialogue, protocol=protocol)


def accept_all() -> ItemJudge:
    """The judge of a run without a verifier."""
    return ExactJudge(lambda task: Verdict(score=1.0), "everything is accepted")


# ---- photographs


def photo_verification(task: JudgeTask) -> Dialogue:
    """One question with the prompt; what is no clear YES is NO."""
    question = PHOTO_QUESTION.format(prompt=task.item.prompt)
    reply = yield JudgeQuestion(
        parts=(task.load_image(), question), max_tokens=PHOTO_TOKENS, understood=lambda reply: True
    )
    accepted = read_final_answer(reply)
    if accepted is None:
        return 0.0, "no final answer"
    return float(accepted), "accepted" if accepted else "rejected"


_FINAL = re.compile(r"final answer\W*(yes|no)\b", re.IGNORECASE)
_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def read_final_answer(reply: str) -> bool | None:
    """The last "Final Answer: YES" or "NO" of a reply, or else the only one of the two words; None for neither."""
    found = [word.lower() for word in _FINAL.findall(reply)]
    if found:
        return found[-1] == "yes"
    words = {word.lower() for word in _WORD.findall(reply)}
    return words == {"yes"} if len(words) == 1 else None


# ---- the toy world


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What a model's reasoning says that it will generate: so many things of one colour and shape."""

    count: int
    words: str


_CONCLUSION = re.compile(
    rf"draw (?P<count>an?|{'|'.join(NUMBERS)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})(?:e?s)?\b"
)


def read_conclusion(reasoning: str) -> Conclusion | None:
    """The last "draw three red stars" of a reasoning; None where it has none."""
    found = list(_CONCLUSION.finditer(reasoning))
    if not found:
        return None
    count = found[-1]["count"]
    number = NUMBERS.index(count) if count in NUMBERS else 1
    return Conclusion(count=number, words=f"{found[-1]['colour']} {found[-1]['shape']}")


def shapes_verification(task: JudgeTask) -> Dialogue:
    """How many there are of what its reasoning concluded, and how many things at all; both must be the number that it
    concluded."""
    conclusion = read_conclusion(task.text)
    if conclusion is None:
        return 0.0, "its reasoning concludes nothing"
    image = task.load_image()
    counts = []
    for what in (plural(conclusion.words), "shapes"):
        question = f"how many {what} are there?"
        reply = yield JudgeQuestion(parts=(image, question), max_tokens=64, understood=lambda reply: True)
        counts.append(read_number(reply))
    accepted = counts == [conclusion.count] * 2
    return float(accepted), f"it concluded {conclusion.count} {conclusion.words}, and counts {counts[0]} of {counts[1]}"
