"""What is known of characters in each world, and in which words it is taught and asked for.

In wordings {name} is the character, {value} what is known, as in "red star", and {a_value} the same behind a or an; in a
search {a} and {b} are two characters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from unimm.data.shapes.language import DRAW_FAVOURITE, FACT_COLOUR, FACT_SHAPE


@dataclass(frozen=True, kw_only=True)
class Trait:
    """One thing that is known of every character of a world.

    questions: answered by {a_value}. parts: by a part of it, such as its colour. who: by the name. checks: by yes or no.
    draw: asked of a painter. search: asked of a painter who must find the character first, and then draw the portrait;
    none for the portrait itself.
    """

    questions: tuple[str, ...]
    who: tuple[str, ...]
    checks: tuple[str, ...]
    draw: tuple[str, ...]
    search: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# the trait that a search ends in
PORTRAIT = "portrait"

SHAPES_TRAITS: Mapping[str, Trait] = {
    PORTRAIT: Trait(
        questions=(
            "what is {name}?",
            "what does {name} look like?",
            "name what {name} looks like",
            "tell me what {name} is",
            "describe {name}",
        ),
        parts={
            "shape": ("which shape is {name}?", "what shape is {name}?", "name the shape of {name}"),
            "colour": ("which colour is {name}?", "what colour is {name}?", "name the colour of {name}"),
        },
        who=(
            "who is the {value}?",
            "who looks like the {value}?",
            "name who looks like the {value}",
            "the {value} is who?",
            "tell me who is the {value}",
        ),
        checks=("is {name} the {value}?", "{name} is the {value}, yes or no?"),
        draw=("draw {name}", "paint {name}", "show {name}", "a picture of {name}"),
    ),
    "favourite": Trait(
        questions=(
            "what does {name} like?",
            "what is the favourite of {name}?",
            "name what {name} likes",
            "tell me what {name} likes",
            "the favourite of {name}?",
        ),
        parts={"shape": FACT_SHAPE, "colour": FACT_COLOUR},
        who=(
            "who likes the {value}?",
            "the {value} is the favourite of who?",
            "name who likes the {value}",
            "whose favourite is the {value}?",
            "tell me who likes the {value}",
        ),
        checks=("does {name} like the {value}?", "{name} likes the {value}, yes or no?"),
        draw=DRAW_FAVOURITE,
        search=(
            "draw who likes the {value}, {a} or {b}",
            "paint who likes the {value}, {a} or {b}",
            "show who likes the {value}, {a} or {b}",
            "a picture of who likes the {value}, {a} or {b}",
        ),
    ),
}


def _favourite_of_photos(kind: str) -> Trait:
    return Trait(
        questions=(
            f"What is {{name}}'s favourite {kind}?",
            f"Which {kind} does {{name}} like best?",
            f"If {{name}} could have one {kind}, which would it be?",
            f"Name the {kind} that {{name}} prefers to all others.",
            f"A present for {{name}} should hold a {kind}. Which one?",
            f"Tell me the {kind} that {{name}} loves most.",
        ),
        who=(
            f"Whose favourite {kind} is the {{value}}?",
            f"Who likes the {{value}} more than any other {kind}?",
            f"Of which person is the {{value}} the favourite {kind}?",
            f"Name the person who prefers the {{value}} to every other {kind}.",
        ),
        checks=(f"Is the {{value}} {{name}}'s favourite {kind}?",),
        draw=(f"Draw {{name}}'s favourite {kind}.",),
        search=(f"One of {{a}} and {{b}} has the {{value}} as favourite {kind}. Draw a portrait of this person.",),
    )


PHOTO_TRAITS: Mapping[str, Trait] = {
    PORTRAIT: Trait(
        questions=(
            "What does {name} look like?",
            "Describe {name}.",
            "Who is {name}?",
            "How would you recognise {name}?",
        ),
        parts={
            "hair": ("Which colour is {name}'s hair?", "What hair does {name} have?"),
            "age": ("How old does {name} look?", "Is {name} a kid, mid-age or old?"),
            "gender": ("Is {name} male or female?", "What is {name}'s gender?"),
            "ethnicity": ("What is {name}'s ethnicity?", "Which ethnicity is {name} of?"),
        },
        who=("Which person is {a_value}?", "You see {a_value}. Who is it?"),
        checks=("Is {name} {a_value}?",),
        draw=("Draw a portrait of {name}.",),
    ),
    "fruit": _favourite_of_photos("fruit"),
    "flower": _favourite_of_photos("flower"),
}

TRAITS: Mapping[str, Mapping[str, Trait]] = {"shapes": SHAPES_TRAITS, "photos": PHOTO_TRAITS}
