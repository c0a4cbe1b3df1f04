"""What a tab's fields say, as a request for the engine. Numbers that are left empty stand for the model's defaults."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unimm.app.album import Album
from unimm.app.capabilities import Tab
from unimm.app.scripts import Piece, Recipe
from unimm.generation.stepwise import ModelRequest, Output, RequestMessage
from unimm.generation.text_sampling import TextSampling
from unimm.processing.images.io import load_image_bytes
from unimm.serving.limits import ServingLimits


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The fields of an image's settings; None for one that is empty."""

    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width). Raises ValueError where only one of them is given."""
        if self.width is None and self.height is None:
            return None
        if self.width is None or self.height is None:
            missing = "width" if self.width is None else "height"
            raise ValueError(f"got no {missing}: give width and height, or neither for the model's own size")
        return self.height, self.width

    @property
    def first_seed(self) -> int:
        """The seed; 0 where the field is empty."""
        return 0 if self.seed is None else self.seed


@dataclass(frozen=True, kw_only=True)
class PageRequest:
    """A request, and how its images are made again: a recipe for each image among its outputs."""

    model: str
    request: ModelRequest
    recipes: tuple[Recipe, ...] = ()


@dataclass(frozen=True)
class PageMessage:
    """A message of the chat: its role, and its texts and the paths of its images, in order."""

    role: str
    pieces: tuple[str | Path, ...]


def parse_whole(text: str, name: str) -> int | None:
    """A whole number as it was typed; None for nothing. Raises ValueError."""
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"got {name} {text!r:.40}: expected a whole number, or nothing for the model's own") from None


def parse_decimal(text: str, name: str) -> float | None:
    """A number as it was typed, with a point or a comma; None for nothing. Raises ValueError."""
    if not text.strip():
        return None
    try:
        return float(text.replace(",", "."))
    except ValueError:
        raise ValueError(f"got {name} {text!r:.40}: expected a number, or nothing for the model's own") from None


def read_images(paths: Sequence[str | Path | None], limits: ServingLimits) -> list[tuple[Image.Image, str]]:
    """The images of the fields that hold one, upright and in RGB, with their file names. Raises ValueError."""
    given = [Path(path) for path in paths if path]
    if len(given) > limits.max_input_images:
        raise ValueError(f"got {len(given)} images: expected at most {limits.max_input_images}")
    return [(load_image_bytes(path.read_bytes(), place=path.name), path.name) for path in given]


def tab_request(
    tab: Tab,
    model: str | None,
    prompt: str,
    images: Sequence[tuple[Image.Image, str]],
    settings: ImageSettings,
    *,
    album: Album,
    output: Output = "image",
    text_sampling: TextSampling | None = None,
) -> PageRequest:
    """The request of any tab but the chat: the images, then the prompt. Raises ValueError for a field that is missing."""
    if model is None:
        raise ValueError("got no model: choose one")
    if tab == "edit" and not images:
        raise ValueError("got no image to edit: upload one, or use one of the gallery as input")
    request = ModelRequest(
        messages=(RequestMessage(role="user", content=(*(image for image, _ in images), prompt)),),
        outputs=(output,),
        think=tab == "think",
        seed=settings.first_seed,
        size=settings.size,
        steps=settings.steps,
        guidance=settings.guidance,
        text_sampling=text_sampling or TextSampling(),
    )
    if output == "text":
        return PageRequest(model=model, request=request)
    pieces: list[Piece] = [*(album.source(image, name) for image, name in images), prompt]
    recipe = Recipe(
        model=model,
        verb="generate",
        pieces=tuple(pieces),
        think=request.think,
        seed=request.seed,
        size=request.size,
        steps=request.steps,
        guidance=request.guidance,
    )
    return PageRequest(model=model, request=request, recipes=(recipe,))


def conversation_request(
    model: str | None,
    messages: Sequence[PageMessage],
    outputs: tuple[Output, ...],
    settings: ImageSettings,
    *,
    album: Album,
    limits: ServingLimits,
) -> PageRequest:
    """The request for the next message of a chat. Raises ValueError for a missing model, and images that cannot be read."""
    if model is None:
        raise ValueError("got no model: choose one")
    asked: list[RequestMessage] = []
    pieces: list[Piece] = []
    for message in messages:
        content: list[str | Image.Image] = []
        for piece in message.pieces:
            if isinstance(piece, str):
                content.append(piece)
                pieces.append(piece)
                continue
            ((image, name),) = read_images([piece], limits)
            content.append(image)
            pieces.append(album.source(image, name))
        asked.append(RequestMessage(role=message.role, content=tuple(content)))
    request = ModelRequest(
        messages=tuple(asked),
        outputs=outputs,
        seed=settings.first_seed,
        size=settings.size,
        steps=settings.steps,
        guidance=settings.guidance,
    )
    recipes = [
        Recipe(
            model=model,
            verb="interleave",
            pieces=tuple(pieces),
            outputs=outputs[: i + 1],
            seed=request.seed,
            size=request.size,
            steps=request.steps,
            guidance=request.guidance,
        )
        for i, output in enumerate(outputs)
        if output == "image"
    ]
    return PageRequest(model=model, request=request, recipes=tuple(recipes))
