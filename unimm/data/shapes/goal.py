"""Examples, and the goals that their outputs are scored by."""

from dataclasses import dataclass

from unimm.data.shapes.world import ImageArray, Scene


@dataclass(frozen=True, kw_only=True)
class WantedObject:
    """One object of a goal; None leaves an attribute free.

    position: the centre (x, y) in pixels; place: a cell's name.
    """

    shape: str
    colour: str
    size: str | None = None
    position: tuple[int, int] | None = None
    place: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImageGoal:
    """An image of these objects and no others; relations are (index of an object, relation, index of an object)."""

    wants: tuple[WantedObject, ...]
    relations: tuple[tuple[int, str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class AnswerGoal:
    """An answer, up to case, spaces and a full stop at its end."""

    text: str


@dataclass(frozen=True, kw_only=True)
class CaptionGoal:
    """The phrases of a caption, in any order."""

    phrases: tuple[str, ...]


Goal = ImageGoal | AnswerGoal | CaptionGoal


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """A prompt with its input images, and the output it should have: an answer, or a target image.

    source_scene and target_scene are the scenes of the input image and of the target, where there is one.
    """

    task: str
    prompt: str
    goal: Goal
    images: tuple[ImageArray, ...] = ()
    think: str | None = None
    answer: str | None = None
    target: ImageArray | None = None
    source_scene: Scene | None = None
    target_scene: Scene | None = None
