"""What the page makes of its fields; its album; which models each tab offers; progress."""

import asyncio

import pytest
from PIL import Image

from unimm import load
from unimm.app.album import MAX_IMAGES, Album
from unimm.app.capabilities import TEXT_ANSWER, can_be_served, chat_answers, models_for
from unimm.app.progress import error_html, follow
from unimm.app.requests import (
    ImageSettings,
    PageMessage,
    conversation_request,
    parse_decimal,
    parse_whole,
    read_images,
    tab_request,
)
from unimm.app.scripts import Recipe, Upload
from unimm.checkpoint.hub import bundled_names
from unimm.serving.engine import Engine
from unimm.serving.limits import ServingLimits

RED = Image.new("RGB", (4, 2), "red")
BLUE = Image.new("RGB", (2, 4), "blue")
SETTINGS = ImageSettings(seed=7, width=32, height=64, steps=3, guidance=2.5)


@pytest.fixture
def album(tmp_path):
    return Album(tmp_path / "album")


def recipe(seed=0):
    return Recipe(model="nano", verb="generate", pieces=("red",), seed=seed)


def test_a_tabs_request(album):
    known = recipe()
    album.add(RED, known, "red")
    images = [(RED, "image.png"), (BLUE, "photo.png")]
    asked = tab_request("edit", "nano", "greener", images, SETTINGS, album=album)
    assert asked.request.messages[0].content == (RED, BLUE, "greener")
    assert (asked.request.size, asked.request.seed, asked.request.steps) == ((64, 32), 7, 3)
    assert asked.request.guidance == 2.5 and asked.request.outputs == ("image",) and not asked.request.think
    (again,) = asked.recipes
    assert again.pieces == (known, Upload("photo.png"), "greener")
    assert (again.size, again.seed, again.steps, again.guidance) == ((64, 32), 7, 3, 2.5)
    thought = tab_request("think", "nano", "why?", [], ImageSettings(), album=album, output="text")
    assert thought.request.think and thought.request.seed == 0 and not thought.recipes


def test_a_chats_request(album):
    entry = album.add(RED, recipe(), "red")
    messages = [
        PageMessage("user", ("draw",)),
        PageMessage("assistant", ("so", entry.path)),
        PageMessage("user", ("and now?",)),
    ]
    outputs = ("image", "text", "image")
    asked = conversation_request("nano", messages, outputs, SETTINGS, album=album, limits=ServingLimits())
    assert [message.role for message in asked.request.messages] == ["user", "assistant", "user"]
    assert asked.request.messages[1].images[0].tobytes() == RED.tobytes()
    assert [one.outputs for one in asked.recipes] == [("image",), outputs]
    assert asked.recipes[0].pieces == ("draw", "so", recipe(), "and now?")


def test_fields_that_are_wrong(album, tmp_path):
    with pytest.raises(ValueError, match="no model"):
        tab_request("draw", None, "red", [], SETTINGS, album=album)
    with pytest.raises(ValueError, match="no image to edit"):
        tab_request("edit", "nano", "red", [], SETTINGS, album=album)
    with pytest.raises(ValueError, match="got no height"):
        tab_request("draw", "nano", "red", [], ImageSettings(width=3), album=album)
    with pytest.raises(ValueError, match=r"got steps '1.5': expected a whole number"):
        parse_whole("1.5", "steps")
    with pytest.raises(ValueError, match="got guidance 'x': expected a number"):
        parse_decimal("x", "guidance")
    assert parse_whole(" ", "steps") is None and parse_whole(" 3 ", "steps") == 3
    assert parse_decimal("", "guidance") is None and parse_decimal("2,5", "guidance") == 2.5
    (tmp_path / "photo.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read photo\.png: got 8 bytes of another kind"):
        read_images([None, tmp_path / "photo.png"], ServingLimits())
    with pytest.raises(ValueError, match="got 2 images: expected at most 1"):
        read_images(["a", "b"], ServingLimits(max_input_images=1))


def test_the_album_keeps_files_until_the_visit_ends(album):
    entries = [album.add(Image.new("RGB", (1, 1), (i, 0, 0)), recipe(i), str(i)) for i in range(MAX_IMAGES + 2)]
    assert [one.caption for one in album.images[:2]] == [str(MAX_IMAGES + 1), str(MAX_IMAGES)]
    assert len(album.images) == MAX_IMAGES == len(list(album.folder.rglob("*.png")))
    assert entries[-1].path.name == f"unimm-seed-{MAX_IMAGES + 1}.png"
    album.discard()
    assert not album.images and not list(album.folder.iterdir())


def test_tabs_offer_the_models_that_can():
    models = {name: load(name) for name in bundled_names()}
    assert all(map(can_be_served, models.values()))
    for tab in ("draw", "ask", "chat"):
        assert models_for(models, tab) == list(models)
    assert {"janus-nano", "janusflow-nano"}.isdisjoint(models_for(models, "edit"))
    assert {"bagel-nano", "metaquery-nano", "uniworld-nano"} <= set(models_for(models, "edit"))
    assert models_for(models, "think") == ["bagel-nano"]
    assert len(chat_answers(models["bagel-nano"])) == 4
    assert chat_answers(models["janus-nano"]) == [TEXT_ANSWER]


def test_who_stops_looking_cancels(nano, album):
    async def look():
        asked = tab_request("draw", "nano", "a red circle", [], ImageSettings(steps=250), album=album)
        seen = []
        progress = follow(engine, asked, client="")
        async for one in progress:
            seen.append(one.status)
            if one.preview is not None:
                break
        await progress.aclose()
        return seen

    with Engine({"nano": nano}) as engine:
        seen = asyncio.run(look())
    assert seen == ["waiting", "step 36 of 250"]
    assert engine.stats.choices["RequestCancelledError"] == 1


def test_errors_are_shown_as_text():
    assert "&lt;b&gt;" in error_html(ValueError("got <b>")) and 'role="alert"' in error_html(ValueError("got <b>"))
    assert "MemoryError" in error_html(MemoryError())
