"""Things that a photograph can show one or several of, by kind, and their singular and plural."""

# each is easy to count and to tell from every other of its kind
OBJECTS = {
    "fruit": ("apple", "banana", "orange", "lemon", "pear", "strawberry", "pineapple", "peach"),
    "animal": ("cat", "dog", "rabbit", "duck", "horse", "elephant", "frog", "penguin"),
    "kitchen item": ("cup", "spoon", "fork", "knife", "plate", "bowl", "teapot", "frying pan"),
    "piece of furniture": ("chair", "table", "sofa", "bed", "bookshelf", "wardrobe", "stool", "desk"),
    "instrument": ("guitar", "violin", "drum", "trumpet", "piano", "flute", "harp", "accordion"),
    "vehicle": ("car", "bicycle", "bus", "truck", "boat", "train", "tractor", "scooter"),
    "piece of clothing": ("hat", "shirt", "sock", "glove", "scarf", "shoe", "jacket", "tie"),
    "thing": ("book", "pencil", "clock", "lamp", "umbrella", "key", "candle", "balloon"),
}
IRREGULAR = {
    "knife": "knives",
    "scarf": "scarves",
    "mouse": "mice",
    "child": "children",
    "fish": "fish",
    "sheep": "sheep",
}


def plural_noun(noun: str) -> str:
    """The plural of an English noun, or of a phrase that ends in one."""
    *before, last = noun.split(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = f"{last[:-1]}ies"
    else:
        last += "es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s"
    return " ".join([*before, last])


def singular_noun(noun: str) -> str:
    """The singular of a plural that `plural_noun` makes."""
    *before, last = noun.split(" ")
    for one, several in IRREGULAR.items():
        if last == several:
            return " ".join([*before, one])
    if last.endswith("ies") and len(last) > 4:
        last = f"{last[:-3]}y"
    elif last.endswith(("sses", "xes", "zes", "ches", "shes", "uses")):
        last = last[:-2]
    else:
        last = last.removesuffix("s")
    return " ".join([*before, last])


def counted(n: int, noun: str) -> str:
    """A number and a noun, given in the singular: 1 cup, 2 cups."""
    return f"{n} {noun if n == 1 else plural_noun(noun)}"


def noun_article(noun: str) -> str:
    """A noun behind a or an."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
