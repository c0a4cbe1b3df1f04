"""The Python code that makes an image of the page again, with the images that it was made of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from unimm.generation.stepwise import Output
from unimm.models.load_options import LoadOptions

LINE = 100  # characters of a call that stays on one line


@dataclass(frozen=True)
class Upload:
    """An image that came as a file; its name, which the code expects in the folder it runs in."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an image was made. pieces: the texts and images before it, in order. None stands for the model's default.

    verb: "generate", whose prompt is the last of `pieces` after its images, or "interleave", of whose `outputs` the
    image is the last. size: (height, width) in pixels.
    """

    model: str
    verb: Literal["generate", "interleave"]
    pieces: tuple["Piece", ...]
    outputs: tuple[Output, ...] = ("image",)
    think: bool = False
    seed: int = 0
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None


Piece: TypeAlias = str | Upload | Recipe


def load_call(model: str, load: LoadOptions) -> str:
    """The call that loads a model."""
    options = "".join(f", {name}={quoted(value)}" for name, value in load.given().items())
    return f"unimm.load({quoted(model)}{options})"


def quoted(text: str) -> str:
    """A text as a Python literal."""
    return json.dumps(text, ensure_ascii=False)


def python_script(recipe: Recipe, *, load: LoadOptions | None = None) -> str:
    """Code that makes an image and saves it: each model is loaded once, each image on the way made once."""
    load = load or LoadOptions()
    recipes = _in_order(recipe)
    models = list(dict.fromkeys(one.model for one in recipes))
    model_names = {name: "model" if len(models) == 1 else f"model_{i + 1}" for i, name in enumerate(models)}
    image_names = {id(one): "image" if len(recipes) == 1 else f"image_{i + 1}" for i, one in enumerate(recipes)}
    lines = ["import unimm", ""]
    if any(isinstance(piece, Upload) for one in recipes if one.verb == "interleave" for piece in one.pieces):
        lines = ["from pathlib import Path", "", *lines]
    lines += [f"{model_names[name]} = {load_call(name, load)}" for name in models]
    for one in recipes:
        lines += _assignment(one, model_names[one.model], image_names)
    return "\n".join([*lines, f'{image_names[id(recipe)]}.save("image.png")', ""])


def _in_order(recipe: Recipe) -> list[Recipe]:
    """A recipe and those of the images that it takes, each after its own."""
    found: dict[int, Recipe] = {}

    def visit(one: Recipe) -> None:
        for piece in one.pieces:
            if isinstance(piece, Recipe) and id(piece) not in found:
                visit(piece)
        found[id(one)] = one

    visit(recipe)
    return list(found.values())


def _assignment(recipe: Recipe, model: str, image_names: dict[int, str]) -> list[str]:
    """The lines that make one image."""
    options = _options(recipe)
    if recipe.verb == "generate":
        images = [_source(piece, image_names) for piece in recipe.pieces if not isinstance(piece, str)]
        prompt = "".join(piece for piece in recipe.pieces if isinstance(piece, str))
        if images:
            options = [f"images={images[0] if len(images) == 1 else _bracketed(images)}", *options]
        return _call(f"{image_names[id(recipe)]} = {model}.generate(", [quoted(prompt), *options], ").image")
    inputs = [
        f"Path({quoted(piece.name)})" if isinstance(piece, Upload) else _source(piece, image_names)
        for piece in recipe.pieces
    ]
    outputs = ", ".join(quoted(one) for one in recipe.outputs) + ("," if len(recipe.outputs) == 1 else "")
    arguments = [_bracketed(inputs), f"outputs=({outputs})", *options]
    return _call(f"*_, {image_names[id(recipe)]} = {model}.interleave(", arguments, ")")


def _source(piece: Piece, image_names: dict[int, str]) -> str:
    """A text, a file's name or an image's variable."""
    if isinstance(piece, Recipe):
        return image_names[id(piece)]
    return quoted(piece if isinstance(piece, str) else piece.name)


def _bracketed(items: Sequence[str]) -> str:
    return f"[{', '.join(items)}]"


def _options(recipe: Recipe) -> list[str]:
    given = {"size": recipe.size, "steps": recipe.steps, "guidance": recipe.guidance}
    options = ["think=True"] if recipe.think else []
    return [*options, f"seed={recipe.seed}", *(f"{name}={value}" for name, value in given.items() if value is not None)]


def _call(begin: str, arguments: Sequence[str], end: str) -> list[str]:
    line = f"{begin}{', '.join(arguments)}{end}"
    if len(line) <= LINE:
        return [line]
    return [begin, *(f"    {argument}," for argument in arguments), end]
