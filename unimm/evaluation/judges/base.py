"""What every judge gives: a verdict on an item's output, with the replies that led to it."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.evaluation.items import EvalItem
from unimm.processing.images.io import load_image


class JudgeUnavailableError(ValueError):
    """A judge that cannot be asked at all: it is down, or refuses."""


class QuestionFailedError(ValueError):
    """A question that a judge did not answer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgeTask:
    """An item, and the output that is to be judged.

    sha256: of the image file as it is now.
    """

    item: EvalItem
    text: str = ""
    image_path: Path | None = None
    sha256: str | None = None

    def load_image(self) -> Image.Image:
        """The output's image."""
        assert self.image_path is not None, "an item whose output is an image has one"
        return load_image(self.image_path, place=f"the image of {self.item.id}")


@dataclass(frozen=True, kw_only=True)
class JudgeReply:
    """What a judge said to one question, word for word, or why it said nothing.

    tries: how often it was asked.
    """

    reply: str | None
    tries: int = 1
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The score of an output; None where the judge failed, which is no score of 0.

    reason: why, in short. replies: of the judge, in order. details: what else is worth keeping.
    """

    score: float | None
    reason: str = ""
    replies: tuple[JudgeReply, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgeQuestion:
    """A question to a reader: texts and images in order, and the most tokens of the reply.

    system: a system prompt, if any. parse: whether a reply is one that was asked for; another is asked for again.
    """

    parts: tuple[str | Image.Image, ...]
    max_tokens: int
    system: str | None = None
    understood: Callable[[str], bool] = bool

    @property
    def text(self) -> str:
        """The texts, without the images."""
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[Image.Image]:
        """The images, without the texts."""
        return [part for part in self.parts if not isinstance(part, str)]


# questions of one item, each asked when the one before has been answered; returns the score and the reason
Dialogue = Generator[JudgeQuestion, str, tuple[float, str]]


class ItemJudge(ABC):
    """A judge of outputs. name: of its manifest; identity: what is written of it into the result."""

    name: str

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What it is, with weights and the hashes of its prompts."""

    def key(self) -> str:
        """The name of its manifest: verdicts of another judge, or under other prompts, are not this one's."""
        # the same model may be found at another address another day
        what = {name: value for name, value in self.identity().items() if name != "url"}
        return f"{self.name}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]}"

    @abstractmethod
    def judge(self, tasks: Sequence[JudgeTask]) -> Iterator[tuple[JudgeTask, Verdict]]:
        """Verdicts, as they come.

        Raises JudgeUnavailableError where it cannot be asked.
        """


class ExactJudge(ItemJudge):
    """A judge that computes: no model scores another."""

    name = "exact"

    def __init__(self, verdict: Callable[[JudgeTask], Verdict], what: str) -> None:
        """verdict: of one output. what: in words, how it is reached."""
        self._verdict = verdict
        self._what = what

    def identity(self) -> dict[str, Any]:
        return {"kind": "exact", "what": self._what}

    def judge(self, tasks: Sequence[JudgeTask]) -> Iterator[tuple[JudgeTask, Verdict]]:
        """Verdicts, in order."""
        for task in tasks:
            yield task, self._verdict(task)
