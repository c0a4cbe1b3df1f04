"""Readers, which answer questions about images, and the judge that holds a benchmark's dialogue with one of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from unimm.evaluation.judges.base import (
    Dialogue,
    ItemJudge,
    JudgeQuestion,
    JudgeReply,
    JudgeTask,
    JudgeUnavailableError,
    QuestionFailedError,
    Verdict,
)
from unimm.generation.text_sampling import TextSampling

# a reply that was not asked for is asked for again this often; so do UniSandBox and WISE
TRIES = 3
# a judge that fails on so many items one after another is down
MOST_FAILURES = 8


class Reader(ABC):
    """Answers questions about images, greedily. name: of the judge's manifest; workers: dialogues at a time."""

    name: str
    workers: int

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What it is."""

    @abstractmethod
    def answer(self, question: JudgeQuestion) -> JudgeReply:
        """One reply. Raises JudgeUnavailableError where no question can be answered."""


class UnderstandingModel(Protocol):
    """The verb that a reader in process needs."""

    def understand(
        self, images: Sequence[Image.Image] | None, question: str, *, text_sampling: TextSampling | None
    ) -> str: ...


class ModelReader(Reader):
    """A model of this library, in this process."""

    workers = 1

    def __init__(self, model: UnderstandingModel, name: str, *, weights: dict[str, Any]) -> None:
        """name: what it was loaded by; weights: what is written of it."""
        self._model = model
        self._name = name
        self._weights = weights
        self.name = f"vlm-{file_word(name)}"

    def identity(self) -> dict[str, Any]:
        return {"kind": "vlm", "model": self._name, "family": type(self._model).__name__, "weights": self._weights}

    def answer(self, question: JudgeQuestion) -> JudgeReply:
        """One reply; a question that the model cannot be asked, as it is too long for it, is a failed one."""
        # greedy, and as long as the model itself writes: a nano has no room for the thousands of tokens of a protocol
        sampling = TextSampling(temperature=0.0)
        # not every family has a system prompt
        text = f"{question.system}\n\n{question.text}" if question.system else question.text
        try:
            return JudgeReply(reply=self._model.understand(question.images or None, text, text_sampling=sampling))
        except ValueError as error:
            return JudgeReply(reply=None, error=" ".join(str(error).split()))


class ReaderJudge(ItemJudge):
    """A judge that asks a reader the questions of a benchmark's protocol."""

    def __init__(
        self, reader: Reader, dialogue: Callable[[JudgeTask], Dialogue], *, protocol: dict[str, Any], tries: int = TRIES
    ) -> None:
        """protocol: what is written of the questions, as where they are from and their hash."""
        self._reader = reader
        self._dialogue = dialogue
        self._protocol = protocol
        self._tries = tries
        self.name = reader.name

    def identity(self) -> dict[str, Any]:
        return {**self._reader.identity(), "protocol": self._protocol, "tries": self._tries}

    def judge(self, tasks: Sequence[JudgeTask]) -> Iterator[tuple[JudgeTask, Verdict]]:
        """Verdicts, as they come; `workers` dialogues are held at a time."""
        failures = 0
        for task, verdict in self._verdicts(tasks):
            yield task, verdict
            failures = failures + 1 if verdict.score is None else 0
            if failures == MOST_FAILURES:
                raise JudgeUnavailableError(
                    f"the judge {self.name} failed on {failures} items one after another, the last time with: "
                    f"{verdict.reason}; what was drawn and judged is kept: put it right and run again"
                )

    def _verdicts(self, tasks: Sequence[JudgeTask]) -> Iterator[tuple[JudgeTask, Verdict]]:
        if self._reader.workers == 1:
            yield from ((task, self._ask(task)) for task in tasks)
            return
        left = iter(tasks)
        pool = ThreadPoolExecutor(self._reader.workers)
        running: dict[Future[Verdict], JudgeTask] = {}
        try:
            while True:
                # no more are begun than run, so that a judge that is down is not asked thousands of times
                for task in left:
                    running[pool.submit(self._ask, task)] = task
                    if len(running) == self._reader.workers:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    yield task, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, task: JudgeTask) -> Verdict:
        """The verdict of one dialogue; failed where a question was not answered, or never as it was asked."""
        replies: list[JudgeReply] = []
        with closing(self._dialogue(task)) as dialogue:
            try:
                question = next(dialogue)
                while True:
                    question = dialogue.send(self._answer(question, replies))
            except StopIteration as end:
                score, reason = end.value
                return Verdict(score=score, reason=reason, replies=tuple(replies))
            except QuestionFailedError as error:
                return Verdict(score=None, reason=str(error), replies=tuple(replies))

    def _answer(self, question: JudgeQuestion, replies: list[JudgeReply]) -> str:
        """A reply that was asked for. Raises QuestionFailedError where none comes."""
        for _ in range(self._tries):
            reply = self._reader.answer(question)
            replies.append(reply)
            if reply.reply is None:
                raise QuestionFailedError(reply.error or "no reply")
            if question.understood(reply.reply):
                return reply.reply
        raise QuestionFailedError(f"reply not understood: {replies[-1].reply!r:.200}")


@dataclass(frozen=True, kw_only=True)
class JudgeSpec:
    """A judge as it is asked for: its kind, and where it is."""

    kind: str
    where: str = ""


def parse_judge(text: str) -> JudgeSpec:
    """A judge from "exact", "vlm:MODEL", "openai:URL", or "detector" with its models behind a colon, if others."""
    kind, _, where = text.partition(":")
    needs_place = {"exact": False, "vlm": True, "openai": True, "detector": None}
    if kind not in needs_place or (needs_place[kind] is not None and needs_place[kind] != bool(where)):
        raise ValueError(f"got --judge {text!r}: expected exact, vlm:MODEL, openai:URL, or detector")
    return JudgeSpec(kind=kind, where=where)


def file_word(text: str) -> str:
    """A text as part of a file's name."""
    return "".join(one if one.isascii() and (one.isalnum() or one in "._+") else "-" for one in text).strip("-.")
