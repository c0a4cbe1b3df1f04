"""A seeded random generator whose samples keep to a split."""

from collections.abc import Callable, Sequence

from unimm.data.seeded_rng import SeededRng
from unimm.data.shapes.world import HELD_OUT, PAIRS, RELATIONS, SIZES, TRAIN_PAIRS, Scene, ShapeColour, Thing


class ExampleRng(SeededRng):
    """The random numbers of one example, the same on every machine."""

    def __init__(self, key: str, *, test: bool) -> None:
        """Seed by the key. test: whether the example is about a held-out pair."""
        super().__init__(key)
        self._subject_pairs = HELD_OUT if test else TRAIN_PAIRS
        self._scene_pairs = PAIRS if test else TRAIN_PAIRS

    def subject(self) -> ShapeColour:
        """The pair an example is about: held out in the test split."""
        return self.choice(self._subject_pairs)

    def other_pair(self, predicate: Callable[[ShapeColour], bool], *, subject: bool = False) -> ShapeColour:
        """A pair that the predicate allows, of those that a scene may hold.

        subject: of those that an example may be about.
        """
        pairs = self._subject_pairs if subject else self._scene_pairs
        return self.choice([pair for pair in pairs if predicate(pair)])

    def distinct_pairs(self, n: int) -> list[ShapeColour]:
        """n different pairs, the first of them the subject."""
        found = [self.subject()]
        while len(found) < n:
            found.append(self.other_pair(lambda pair: pair not in found))
        return found

    def distinct_cells(self, n: int) -> list[int]:
        """n different cells."""
        return self.shuffled(range(9))[:n]

    def related_cells(self, relation: str) -> tuple[int, int]:
        """Two cells that stand in the relation; half of the time, or more, in one row or one column exactly."""
        low, high = self.choice(((0, 1), (0, 2), (1, 2)))
        across = self.integer(0, 2)
        aside = across if self.coin() else (across + self.integer(1, 2)) % 3
        step, stride = (1, 3) if relation in RELATIONS[:2] else (3, 1)
        first = low * step + across * stride
        second = high * step + aside * stride
        return (first, second) if relation in ("left of", "above") else (second, first)

    def thing(self, pair: ShapeColour, cell: int, *, size: str | None = None) -> Thing:
        """A thing of the pair with jitter, and a random size if none is given."""
        dx = self.integer(-1, 1)
        dy = self.integer(-1, 1)
        return Thing(shape=pair[0], colour=pair[1], size=size or self.choice(SIZES), cell=cell, dx=dx, dy=dy)

    def scene(self, pairs: Sequence[ShapeColour]) -> Scene:
        """The pairs in random cells; things stand in the order of the pairs."""
        placed = zip(pairs, self.distinct_cells(len(pairs)), strict=True)
        return Scene(things=tuple(self.thing(pair, cell) for pair, cell in placed))
