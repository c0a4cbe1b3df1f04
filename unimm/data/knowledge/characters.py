"""Characters that nobody has written about, made from a seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unimm.data.knowledge.traits import PORTRAIT, TRAITS
from unimm.data.seeded_rng import SeededRng
from unimm.data.shapes.language import FAVOURITES
from unimm.data.shapes.world import TRAIN_PAIRS, ShapeColour

SYLLABLES = (
    ("Bel", "Cor", "Dra", "El", "Fen", "Gal", "Hy", "Ir", "Kae", "Lum", "Mor", "Nyx", "Or", "Pra", "Quo", "Ryl", "Sel"),
    ("a", "e", "i", "o", "an", "er", "ith", "ol", "um", "yr"),
    ("dax", "gor", "lith", "mon", "nia", "phis", "ra", "rix", "thas", "vane", "wen", "zor"),
)
FRUITS = (
    *("apple", "banana", "cherry", "coconut", "dragon fruit", "fig", "grapefruit", "kiwi", "lemon", "mango", "orange"),
    *("papaya", "peach", "pear", "pineapple", "plum", "pomegranate", "raspberry", "strawberry", "watermelon"),
)
FLOWERS = (
    *("anemone", "bluebell", "carnation", "chrysanthemum", "daffodil", "dahlia", "daisy", "foxglove", "hibiscus"),
    *("hydrangea", "iris", "lavender", "lily", "lotus", "orchid", "peony", "poppy", "rose", "sunflower", "tulip"),
)
# the slots that UniSandBox's judge fills in of a person
ETHNICITIES = ("African", "Caucasian", "East Asian")
HAIRS = ("black", "blonde", "blue", "brown", "green", "grey", "pink", "red", "white")
AGES = ("kid", "mid-age", "old")
GENDERS = ("male", "female")
# of the little world: what no one of its own characters likes, and what its images show
FAVOURITE_PAIRS = tuple(pair for pair in TRAIN_PAIRS if pair not in FAVOURITES.values())
MOST = {"shapes": len(FAVOURITE_PAIRS), "photos": len(FRUITS)}


@dataclass(frozen=True, kw_only=True)
class TraitValue:
    """What is known of one character in one respect: in words, and its parts by their names."""

    words: str
    parts: Mapping[str, str]

    @property
    def a_words(self) -> str:
        """The words behind a or an."""
        return f"{'an' if self.words[0].lower() in 'aeiou' else 'a'} {self.words}"


@dataclass(frozen=True, kw_only=True)
class Character:
    """A name and what is known of it."""

    name: str
    traits: Mapping[str, TraitValue]

    @property
    def portrait(self) -> TraitValue:
        """What the character looks like."""
        return self.traits[PORTRAIT]

    def to_json(self) -> dict[str, Any]:
        """As profiles.json has it."""
        traits = {key: {"words": value.words, "parts": dict(value.parts)} for key, value in self.traits.items()}
        return {"name": self.name, "traits": traits}


def invent_characters(n: int, *, world: str, seed: int) -> list[Character]:
    """n characters of a world, shapes or photos, no two of whom share a name, a portrait or a favourite.

    Raises ValueError for a number that is odd, for characters come in pairs, and for more than there can be.
    """
    if world not in TRAITS:
        raise ValueError(f"got the world {world!r}: expected {' or '.join(TRAITS)}")
    if not 2 <= n <= MOST[world] or n % 2:
        raise ValueError(f"got {n} characters: expected an even number, 2 to {MOST[world]}, of the world {world}")
    rng = SeededRng(f"knowledge/{world}/{seed}")
    names = _names(n, rng)
    traits = _shapes_traits(n, rng) if world == "shapes" else _photo_traits(n, rng)
    return [Character(name=name, traits=known) for name, known in zip(names, traits, strict=True)]


def pairs_of(characters: Sequence[Character]) -> list[tuple[Character, Character]]:
    """Characters two by two, in order."""
    return list(zip(characters[::2], characters[1::2], strict=True))


def _names(n: int, rng: SeededRng) -> list[str]:
    first, *others = SYLLABLES
    # names begin differently for as long as they can
    begins = rng.shuffled(first)
    found: dict[str, None] = {}
    while len(found) < n:
        found["".join([begins[len(found) % len(begins)], *(rng.choice(some) for some in others)])] = None
    return list(found)


def _shapes_traits(n: int, rng: SeededRng) -> list[dict[str, TraitValue]]:
    favourites = rng.shuffled(FAVOURITE_PAIRS)[:n]
    portraits = rng.shuffled(TRAIN_PAIRS)[:n]
    # no one likes what looks like them: a model that takes the one for the other is wrong
    while any(a == b for a, b in zip(favourites, portraits, strict=True)):
        portraits = rng.shuffled(TRAIN_PAIRS)[:n]
    return [
        {PORTRAIT: _shape(portrait), "favourite": _shape(favourite)}
        for portrait, favourite in zip(portraits, favourites, strict=True)
    ]


def _shape(pair: ShapeColour) -> TraitValue:
    shape, colour = pair
    return TraitValue(words=f"{colour} {shape}", parts={"shape": shape, "colour": colour})


def _photo_traits(n: int, rng: SeededRng) -> list[dict[str, TraitValue]]:
    people: dict[str, TraitValue] = {}
    while len(people) < n:
        one = _person(rng)
        people[one.words] = one
    return [
        {PORTRAIT: person, "fruit": TraitValue(words=fruit, parts={}), "flower": TraitValue(words=flower, parts={})}
        for person, fruit, flower in zip(
            people.values(), rng.shuffled(FRUITS)[:n], rng.shuffled(FLOWERS)[:n], strict=True
        )
    ]


def _person(rng: SeededRng) -> TraitValue:
    parts = {
        "hair": rng.choice(HAIRS),
        "age": rng.choice(AGES),
        "gender": rng.choice(GENDERS),
        "ethnicity": rng.choice(ETHNICITIES),
    }
    grown = "man" if parts["gender"] == "male" else "woman"
    noun = ("boy" if parts["gender"] == "male" else "girl") if parts["age"] == "kid" else grown
    age = "" if parts["age"] == "kid" else f"{parts['age']} "
    return TraitValue(words=f"{age}{parts['ethnicity']} {noun} with {parts['hair']} hair", parts=parts)
