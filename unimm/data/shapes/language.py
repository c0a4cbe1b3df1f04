"""Phrases for things and places, and the prompt templates of every task."""

from unimm.data.shapes.world import Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
LETTERS = tuple("ABCDEFGH")

# what each character likes, among the pairs of the train split; twelve names, six shapes twice, no pair twice
FAVOURITES = {
    "Tom": ("star", "red"),
    "Anna": ("circle", "blue"),
    "Ben": ("square", "green"),
    "Clara": ("triangle", "yellow"),
    "David": ("diamond", "purple"),
    "Emma": ("cross", "orange"),
    "Felix": ("star", "cyan"),
    "Grace": ("circle", "black"),
    "Henry": ("square", "red"),
    "Ivy": ("triangle", "blue"),
    "Jack": ("diamond", "green"),
    "Kate": ("cross", "yellow"),
}

# {what} a phrase with its article or number
DRAW = ("{what}", "draw {what}", "a picture of {what}", "show {what}", "paint {what}")
DRAW_FAVOURITE = (
    "draw what {name} likes",
    "paint the favourite of {name}",
    "show what {name} likes",
    "a picture of what {name} likes",
)
DRAW_SUM = ("draw {sum} {what}", "as many {what} as {sum}", "show {sum} {what}", "{sum} {what}")
DRAW_LETTER = ("draw {letter}", "show {letter}", "paint {letter}", "a picture of {letter}")

CAPTION = ("describe the picture", "what is in the picture?", "name all the shapes", "what do you see?")
CAPTION_FULL = (
    "describe the picture with sizes and places",
    "what is where in the picture?",
    "name all the shapes with sizes and places",
)

COUNT = ("how many {what} are there?", "count the {what}", "how many {what} do you see?")
COLOUR = ("what colour is {what}?", "which colour is {what}?", "name the colour of {what}")
SHAPE = ("what shape is {what}?", "which shape is {what}?", "name the shape of {what}")
THERE = ("is there {what}?", "do you see {what}?", "is {what} in the picture?")
WHERE = ("where is {what}?", "where do you see {what}?", "name the place of {what}")
RELATION = ("is {a} {relation} {b}?", "do you see {a} {relation} {b}?", "{a} is {relation} {b}, yes or no?")
MORE = ("are there more {a} than {b}?", "do you see more {a} than {b}?", "more {a} than {b}, yes or no?")
LARGER = ("which is larger, {a} or {b}?", "{a} or {b}, which is larger?", "name the larger of {a} and {b}")
SMALLER = ("which is smaller, {a} or {b}?", "{a} or {b}, which is smaller?", "name the smaller of {a} and {b}")

RECOLOUR = ("make {what} {colour}", "paint {what} {colour}", "change {what} to {colour}", "{what} should be {colour}")
REMOVE = ("remove {what}", "take away {what}", "the picture without {what}", "delete {what}")
ADD = ("add {what}", "put in {what}", "now with {what}", "draw {what} too")
SWAP = ("swap {a} and {b}", "exchange {a} and {b}", "let {a} and {b} change places")
RESIZE = ("make {what} {size}", "change {what} to {size}", "{what} should be {size}")

FACT_SHAPE = ("which shape does {name} like?", "what shape does {name} like?", "name the shape {name} likes")
FACT_COLOUR = ("which colour does {name} like?", "what colour does {name} like?", "name the colour {name} likes")
FACT_WHO = ("who likes {what}?", "{what} is the favourite of who?", "name who likes {what}")


def plural(noun: str) -> str:
    """The plural of a noun."""
    return noun + "es" if noun.endswith("s") else noun + "s"


def article(words: str) -> str:
    """The words with a or an before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def count_phrase(n: int, words: str) -> str:
    """A number word and the words that follow, which end in the noun."""
    return f"{NUMBERS[n]} {words if n == 1 else plural(words)}"


def join_phrases(phrases: list[str]) -> str:
    """The phrases as a list in words: a, b and c."""
    return " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)


def describe(thing: Thing, *, size: bool = False, place: bool = False) -> str:
    """A thing in words: a red circle; with size and place, a large red circle at the top left."""
    words = article(f"{thing.size} {thing.colour} {thing.shape}" if size else f"{thing.colour} {thing.shape}")
    return f"{words} {place_phrase(thing.place)}" if place else words


def place_phrase(place: str) -> str:
    """The place with its preposition."""
    return f"in the {place}" if place == "centre" else f"at the {place}"


def referring_expressions(thing: Thing, scene: Scene) -> list[str]:
    """Every phrase for the thing that fits no other thing of the scene, the longest first."""
    others = [other for other in scene.things if other is not thing]
    found = []
    if all(other.pair != thing.pair for other in others):
        found.append(f"the {thing.colour} {thing.shape}")
    if all(other.shape != thing.shape for other in others):
        found.append(f"the {thing.shape}")
    if all(other.colour != thing.colour for other in others):
        found.append(f"the {thing.colour} thing")
    return found
