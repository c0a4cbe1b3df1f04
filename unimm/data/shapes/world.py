"""The shapes world: things in a 64x64 image, the split by (shape, colour) pairs, and an exact renderer."""

from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 64
CELL_SIZE = 21
BACKGROUND = (235, 235, 235)
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
PALETTE = {
    "red": (215, 20, 30),
    "green": (20, 155, 50),
    "blue": (30, 60, 225),
    "yellow": (255, 225, 0),
    "purple": (145, 30, 175),
    "orange": (250, 120, 0),
    "cyan": (20, 200, 225),
    "black": (15, 15, 15),
}
COLOURS = tuple(PALETTE)
WIDTHS = {"small": 11, "large": 17}
SIZES = tuple(WIDTHS)
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")

# the split: one colour a shape, and no colour twice, so that training knows every word of a test prompt
HELD_OUT = (
    ("circle", "yellow"),
    ("square", "purple"),
    ("triangle", "cyan"),
    ("star", "orange"),
    ("diamond", "red"),
    ("cross", "green"),
)
PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
TRAIN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# centres closer than this along an axis stand in no relation along it
MIN_SEPARATION = 8

# subsamples a pixel and axis; a pixel that lies inside has a coverage of FULL_COVERAGE
SUBSAMPLES = 8
FULL_COVERAGE = SUBSAMPLES**2
# a five-pointed star in a box of +-1000, inner radius 0.45 of the outer: numbers, so that it does not depend on libm
STAR = (
    (0, -950),
    (278, -282),
    (998, -224),
    (449, 246),
    (617, 950),
    (0, 572),
    (-617, 950),
    (-449, 246),
    (-998, -224),
    (-278, -282),
)

ImageArray = NDArray[np.uint8]
ShapeColour = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object; cell is row * 3 + column of the 3x3 grid, dx and dy shift it by -1..1 pixels."""

    shape: str
    colour: str
    size: str
    cell: int
    dx: int = 0
    dy: int = 0

    def __post_init__(self) -> None:
        """Refuse attributes that are not defined above."""
        check_known("shape", self.shape, SHAPES)
        check_known("colour", self.colour, COLOURS)
        check_known("size", self.size, SIZES)
        if not 0 <= self.cell < 9:
            raise ValueError(f"got cell {self.cell}, expected 0..8: use row * 3 + column of the 3x3 grid")
        if not (-1 <= self.dx <= 1 and -1 <= self.dy <= 1):
            raise ValueError(f"got dx, dy {self.dx}, {self.dy}, expected -1..1: a wider shift could let objects touch")

    @property
    def pair(self) -> ShapeColour:
        """Shape and colour, which the split is made by."""
        return self.shape, self.colour

    @property
    def x(self) -> int:
        """The pixel column of the centre."""
        return self.cell % 3 * CELL_SIZE + CELL_SIZE // 2 + 1 + self.dx

    @property
    def y(self) -> int:
        """The pixel row of the centre."""
        return self.cell // 3 * CELL_SIZE + CELL_SIZE // 2 + 1 + self.dy

    @property
    def place(self) -> str:
        """The name of the cell."""
        return PLACES[self.cell]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Things in an image, at most one a cell."""

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        """Refuse two things in one cell."""
        cells = sorted(thing.cell for thing in self.things)
        if len(set(cells)) != len(cells):
            raise ValueError(f"got things in cells {cells}, expected every cell at most once: move one to a free cell")

    def reading_order(self) -> tuple[Thing, ...]:
        """The things row by row, each row from the left."""
        return tuple(sorted(self.things, key=lambda thing: thing.cell))


def check_known(what: str, got: str, names: Collection[str]) -> None:
    """Raise ValueError, with the nearest known name, for a name that is not among them. what: its kind."""
    if got not in names:
        near = get_close_matches(str(got), names, n=1, cutoff=0.0)[0]
        raise ValueError(f"got {what} {got!r}, expected one of {', '.join(names)}; did you mean {near!r}?")


def place_of(x: float, y: float) -> str:
    """The name of the cell that holds the pixel."""
    row, column = (min(max(int(v - 0.5) // CELL_SIZE, 0), 2) for v in (y, x))
    return PLACES[row * 3 + column]


def related(a: tuple[float, float], relation: str, b: tuple[float, float]) -> bool:
    """Whether a centre (x, y) stands left of, right of, above or below another, by more than MIN_SEPARATION pixels."""
    axis = 0 if relation in ("left of", "right of") else 1
    sign = 1 if relation in ("left of", "above") else -1
    return sign * (b[axis] - a[axis]) > MIN_SEPARATION


@cache
def coverage(shape: str, width: int) -> NDArray[np.int64]:
    """The number, of the FULL_COVERAGE subsamples of each pixel a shape in a box of that width covers, [width,
    width]."""
    half = width * SUBSAMPLES
    # odd coordinates at the subsamples' centres, half the box is `half`, a pixel is 2 * SUBSAMPLES: all whole numbers
    line = np.arange(1 - half, half, 2, dtype=np.int64)
    inside = _inside_shape(shape, line[None, :], line[:, None], half)
    covered: NDArray[np.int64] = inside.reshape(width, SUBSAMPLES, width, SUBSAMPLES).sum(axis=(1, 3), dtype=np.int64)
    return covered


def _inside_shape(shape: str, x: NDArray[np.int64], y: NDArray[np.int64], half: int) -> NDArray[np.bool_]:
    """Whether each point of the grid lies in the shape; y points down, the box is -half..half."""
    if shape == "circle":
        return x * x + y * y <= half * half
    if shape == "square":
        # one pixel in from the box on each side, which gives it the circle's area
        return np.maximum(abs(x), abs(y)) <= half - 2 * SUBSAMPLES
    if shape == "triangle":
        return (14 * abs(x) <= 8 * y + 7 * half) & (8 * y <= 7 * half)
    if shape == "diamond":
        return abs(x) + abs(y) <= half
    if shape == "cross":
        return 3 * np.minimum(abs(x), abs(y)) <= half
    return _in_polygon(x * 1000, y * 1000, [(a * half, b * half) for a, b in STAR])


def _in_polygon(x: NDArray[np.int64], y: NDArray[np.int64], corners: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """Whether each point lies in a polygon, by the even-odd rule in whole numbers."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y1 > y2:
            x1, y1, x2, y2 = x2, y2, x1, y1
        inside ^= (y1 <= y) & (y < y2) & ((x - x1) * (y2 - y1) < (y - y1) * (x2 - x1))
    return inside


@cache
def _sprite(shape: str, colour: str, size: str) -> ImageArray:
    """The object over the background, [width, width, 3]."""
    cover = coverage(shape, WIDTHS[size])[:, :, None]
    mixed: NDArray[np.int64] = cover * np.array(PALETTE[colour], np.int64) + (FULL_COVERAGE - cover) * np.array(
        BACKGROUND, np.int64
    )
    return ((mixed + FULL_COVERAGE // 2) // FULL_COVERAGE).astype(np.uint8)


@cache
def _empty_canvas() -> ImageArray:
    """An empty image; callers copy it."""
    return np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, dtype=np.uint8)


def render(scene: Scene) -> ImageArray:
    """The image of a scene, uint8 [64, 64, 3]; the same bytes on every machine."""
    canvas = _empty_canvas().copy()
    for thing in scene.things:
        half = WIDTHS[thing.size] // 2
        rows, columns = (slice(at - half, at + half + 1) for at in (thing.y, thing.x))
        canvas[rows, columns] = _sprite(thing.shape, thing.colour, thing.size)
    return canvas
