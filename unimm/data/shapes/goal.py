"""What an example is, and what its judge asks of an output."""

from dataclasses import dataclass

from unimm.data.shapes.world import ImageArray, Scene


@dataclass(frozen=True, kw_only=True)
class WantedObject:
    """One object asked for; None leaves an attribute free; at is a centre (x, y) in pixels, place a cell's name."""

    shape: str
    colour: str
    size: str | None = None
    position: tuple[int, int] | None = None
    place: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImageGoal:
    """A picture with these objects and no more; relations are (index of a want, relation, index of a want)."""

    wants: tuple[WantedObject, ...]
    relations: tuple[tuple[int, str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class AnswerGoal:
    """One answer, but for case, spaces and a full stop at its end."""

    text: str


@dataclass(frozen=True, kw_only=True)
class CaptionGoal:
    """The phrases of a caption, in any order."""

    phrases: tuple[str, ...]


Goal = ImageGoal | AnswerGoal | CaptionGoal


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """A prompt with its input pictures, and what should come of it: an answer, or a target picture to draw.

    before and after are the scenes of the input picture and of the target, where there is one.
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
