"""The code that the page shows: what it says, and that it makes the image again."""

import pytest
from helpers.serving import ROUNDING, levels_apart
from PIL import Image

from unimm.app.scripts import Recipe, Upload, python_script
from unimm.models.load_options import LoadOptions

DRAWN = Recipe(model="bagel-nano", verb="generate", pieces=("a red circle",), seed=3, steps=2)


def test_one_image():
    assert python_script(DRAWN).splitlines() == [
        "import unimm",
        "",
        'model = unimm.load("bagel-nano")',
        'image = model.generate("a red circle", seed=3, steps=2).image',
        'image.save("image.png")',
    ]


def test_an_image_of_images():
    """Each image on the way is made once, a model is loaded once, and a text of any letters is a literal."""
    edited = Recipe(model="bagel-nano", verb="generate", pieces=(DRAWN, Upload('my "photo".png'), "make\nit \\ green"))
    last = Recipe(model="janus-nano", verb="generate", pieces=(edited, DRAWN, "again"), size=(64, 32))
    assert python_script(last, load=LoadOptions(device="cuda", dtype="bfloat16")).splitlines() == [
        "import unimm",
        "",
        'model_1 = unimm.load("bagel-nano", device="cuda", dtype="bfloat16")',
        'model_2 = unimm.load("janus-nano", device="cuda", dtype="bfloat16")',
        'image_1 = model_1.generate("a red circle", seed=3, steps=2).image',
        'image_2 = model_1.generate("make\\nit \\\\ green", images=[image_1, "my \\"photo\\".png"], seed=0).image',
        'image_3 = model_2.generate("again", images=[image_2, image_1], seed=0, size=(64, 32)).image',
        'image_3.save("image.png")',
    ]


def test_a_long_call_takes_a_line_for_each_argument():
    lines = python_script(Recipe(model="bagel-nano", verb="generate", pieces=("a red circle " * 8,))).splitlines()
    assert lines[3:7] == ["image = model.generate(", f'    "{"a red circle " * 8}",', "    seed=0,", ").image"]


@pytest.mark.parametrize("outputs", [("image",), ("text", "image")])
def test_it_makes_the_image_of_a_chat_again(outputs, nano, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = Image.new("RGB", (64, 64), "white")
    photo.save("photo.png")
    drawn = nano.generate("a red circle", seed=3, steps=2).image
    recipe = Recipe(
        model="bagel-nano",
        verb="interleave",
        pieces=(Upload("photo.png"), "draw", DRAWN, "and a square"),
        outputs=outputs,
        seed=5,
        steps=2,
        guidance=2.0,
    )
    exec(python_script(recipe), {})
    pieces = [photo, "draw", drawn, "and a square"]
    *_, expected = nano.interleave(pieces, outputs=outputs, seed=5, steps=2, guidance=2.0)
    with Image.open("image.png") as image:
        assert levels_apart(image, expected) <= ROUNDING
