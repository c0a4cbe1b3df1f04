"""A request on its way through the engine, as the page shows it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from html import escape
from time import monotonic

from PIL import Image

from unimm.app.requests import PageRequest
from unimm.serving.engine import Engine
from unimm.serving.events import Event, ImageDone, ImagePreview, ServingError, TextPiece
from unimm.serving.thinking import BEGIN, END, ThinkSplitter

# what is said to who asked; anything else is a fault of ours, which Gradio logs and reports
SHOWN_ERRORS = (ValueError, NotImplementedError, MemoryError, OSError, ServingError)
MAX_PREVIEWS = 6  # of an image, on its way


@dataclass(frozen=True)
class Progress:
    """What there is of an answer. preview: the image on its way, as it would be now. is_done: nothing more comes."""

    outputs: tuple[str | Image.Image, ...] = ()
    reasoning: str = ""
    preview: Image.Image | None = None
    status: str = ""
    is_done: bool = False

    @property
    def text(self) -> str:
        """The texts, one after the other."""
        return "".join(one for one in self.outputs if isinstance(one, str))

    @property
    def images(self) -> list[Image.Image]:
        """The finished images."""
        return [one for one in self.outputs if isinstance(one, Image.Image)]

    @property
    def thoughts(self) -> str:
        """The reasoning, without the marks around it."""
        return self.reasoning.strip().removeprefix(BEGIN).removesuffix(END).strip()

    @property
    def latest_image(self) -> Image.Image | None:
        """The image to show: the one on its way, or the last finished one."""
        return self.preview or (self.images[-1] if self.images else None)

    def with_text(self, channel: str, text: str) -> "Progress":
        """With more of the answer's text, or of the reasoning."""
        if channel == "reasoning":
            return replace(self, reasoning=self.reasoning + text, status="thinking")
        if self.outputs and isinstance(self.outputs[-1], str):
            outputs = (*self.outputs[:-1], self.outputs[-1] + text)
        else:
            outputs = (*self.outputs, text)
        return replace(self, outputs=outputs, status="writing")


@dataclass
class _Follower:
    """Turns the events of one answer into its progress."""

    splitter: ThinkSplitter
    progress: Progress = field(default_factory=Progress)

    def take(self, event: Event) -> None:
        """One more event."""
        if isinstance(event, TextPiece):
            pieces = [("reasoning", event.text)] if event.channel == "reasoning" else self.splitter.push(event.text)
        else:
            pieces = self.splitter.rest()
        for channel, text in pieces:
            self.progress = self.progress.with_text(channel, text)
        if isinstance(event, ImagePreview):
            status = f"step {event.step} of {event.n_steps}"
            self.progress = replace(self.progress, preview=event.image, status=status)
        elif isinstance(event, ImageDone):
            self.progress = replace(self.progress, outputs=(*self.progress.outputs, event.image), preview=None)


async def follow(engine: Engine, asked: PageRequest, *, client: str) -> AsyncIterator[Progress]:
    """The progress of a request until it is done; who stops iterating cancels it. Raises as `Engine.submit` does."""
    began = monotonic()
    previews = MAX_PREVIEWS if "image" in asked.request.outputs else 0
    ticket = engine.submit(asked.model, asked.request, previews=previews, client=client)
    follower = _Follower(ThinkSplitter(enabled=asked.request.think and "image" not in asked.request.outputs))
    yield Progress(status="waiting")
    try:
        async for event in ticket:
            follower.take(event)
            yield follower.progress
    finally:
        ticket.cancel()
    status = f"done in {monotonic() - began:.1f} s with seed {asked.request.seed}"
    yield replace(follower.progress, status=status, is_done=True)


def status_html(text: str, *, is_error: bool = False) -> str:
    """A status line."""
    role = "alert" if is_error else "status"
    return f'<p class="unimm-status unimm-{role}" role="{role}">{escape(text)}</p>'


def error_html(error: BaseException) -> str:
    """An error in the library's own words as a status line."""
    return status_html(str(error) or type(error).__name__, is_error=True)
