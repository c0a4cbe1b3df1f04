"""Questions about characters that were made up, in UniSandBox's files; of the little world with goals to judge exactly.

test_knowledge/NAME.jsonl, NAME_NAME.jsonl   requests to draw, in the format of UniSandBox's files
test_words/NAME.jsonl, NAME_NAME.jsonl       of the little world: the same, to be answered in words
"""

from collections.abc import Sequence
from pathlib import Path

from unimm.data.knowledge.characters import pairs_of
from unimm.data.knowledge.files import KnowledgeSet, write_rows
from unimm.data.knowledge.texts import (
    KnowledgeText,
    forward_questions,
    inverse_questions,
    who_questions,
    word_questions,
)
from unimm.data.reasoning.questions import ReasoningQuestion
from unimm.data.shapes import COLOURS, SHAPES, AnswerGoal, Example, ImageGoal, WantedObject
from unimm.evaluation.benchmarks.unisandbox.files import KNOWLEDGE, WORDS

# of a set of the little world
SHAPES_TASKS = (*KNOWLEDGE, *WORDS)


def write_knowledge_benchmark(folder: Path, made: KnowledgeSet) -> Path:
    """Write the questions about a set's characters, though not about those it reasons about; returns their folder."""
    out = folder / "benchmark"
    for one in made.characters:
        _write(out / "test_knowledge" / f"{one.name}.jsonl", forward_questions(one, world=made.world))
    for pair in pairs_of(made.characters):
        name = "_".join(one.name for one in pair)
        _write(out / "test_knowledge" / f"{name}.jsonl", inverse_questions(pair, world=made.world))
    if made.world == "shapes":
        for one in made.characters:
            _write(out / "test_words" / f"{one.name}.jsonl", word_questions(one, world=made.world))
        for pair in pairs_of(made.characters):
            name = "_".join(one.name for one in pair)
            _write(
                out / "test_words" / f"{name}.jsonl",
                [text for one in pair for text in who_questions(one, world=made.world)],
            )
    return out


def _write(path: Path, texts: Sequence[KnowledgeText]) -> None:
    write_rows(path, ({"ID": i, "Question": one.question, "Answer": one.answer} for i, one in enumerate(texts, 1)))


def shapes_example(task: str, one: ReasoningQuestion) -> Example:
    """A question about a character of the little world with its goal. Raises ValueError for an answer that is none."""
    if task in WORDS:
        return Example(task=task, prompt=one.question, goal=AnswerGoal(text=one.answer), answer=one.answer)
    words = one.answer.split()
    if len(words) != 3 or words[0] not in ("a", "an") or words[1] not in COLOURS or words[2] not in SHAPES:
        raise ValueError(f"got the answer {one.answer!r} of {one.id}: expected a colour and a shape, as in a red star")
    want = WantedObject(shape=words[2], colour=words[1])
    return Example(task=task, prompt=one.question, goal=ImageGoal(wants=(want,)))
