"""What a client of the engine hears of its request, in order; and the errors that end one."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from PIL import Image


@dataclass(frozen=True)
class TextPiece:
    """More of a text. channel: "text" of the answer, or "reasoning" before it."""

    choice: int
    text: str
    channel: Literal["text", "reasoning"]


@dataclass(frozen=True)
class ImagePreview:
    """What an image would be by what is known after `step` of its `n_steps` steps; index: of the image's previews."""

    choice: int
    image: Image.Image
    step: int
    n_steps: int
    index: int


@dataclass(frozen=True)
class ImageDone:
    """A finished image."""

    choice: int
    image: Image.Image


@dataclass(frozen=True)
class ChoiceDone:
    """The end of one of a request's `n` answers. n_tokens: new ids of its texts, and the steps of its images."""

    choice: int
    finish_reason: Literal["stop", "length"]
    n_prompt_tokens: int
    n_tokens: int
    n_reasoning_tokens: int
    n_images: int


Event: TypeAlias = TextPiece | ImagePreview | ImageDone | ChoiceDone


class ServingError(Exception):
    """An error of the engine's own, not of the request."""


class QueueFullError(ServingError):
    """As many requests wait as may; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class EngineStoppedError(ServingError):
    """The engine is stopping, or has stopped: it takes no more requests."""


class DeadlineError(ServingError):
    """A request was not done in its time."""


class RequestCancelledError(ServingError):
    """A request was cancelled by its client."""


class WorkerFailedError(ServingError):
    """What worked on a request failed for a reason that is not the request's."""
