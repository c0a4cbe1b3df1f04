"""The page in Debian's Chromium, used as a person would: every tab, the gallery, errors, stopping, a phone."""

import re

import pytest
from helpers.browser import DESKTOP, DONE, PHONE, Visitor, chromium, needs_browser, page_server
from helpers.serving import ROUNDING, levels_apart
from PIL import Image

SCENE = "a red circle left of a blue square"
EDIT = "make the circle green"
STEPS = 6

pytestmark = [needs_browser, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def address():
    with page_server("--model", "bagel-nano") as found:
        yield found


def equal(image, expected):
    return levels_apart(image, expected) <= ROUNDING


def image_of(code, folder, monkeypatch):
    """What code saves, run in a folder."""
    monkeypatch.chdir(folder)
    exec(code, {})
    with Image.open(folder / "image.png") as opened:
        return opened.convert("RGB")


# a minute of a busy machine; the tabs' own functions are tested without a browser
@pytest.mark.nightly
def test_every_tab_at_a_desk(address, nano, tmp_path, monkeypatch):
    with chromium(address, **DESKTOP) as tab:
        visitor = Visitor(tab, tmp_path)
        drawn = draws(visitor, nano)
        edited = edits(visitor, nano, drawn)
        assert equal(image_of(visitor.code(), tmp_path, monkeypatch), edited)
        asks(visitor, nano, drawn)
        thinks(visitor, nano)
        chats(visitor, nano)
        assert visitor.shows("#chat .bot", image_of(visitor.code(), tmp_path, monkeypatch))


def draws(visitor, nano):
    """With a prompt and settings: previews on the way, the library's image, its file."""
    visitor.fill(seed=3, steps=STEPS)
    statuses = visitor.statuses("draw")
    visitor.run("draw", SCENE)
    expected = nano.generate(SCENE, seed=3, steps=STEPS).image
    assert f"step {STEPS // 2} of {STEPS}" in statuses()
    assert visitor.shows(".unimm-result", expected)
    with visitor.tab.expect_download() as download:
        visitor.tab.locator("#download").click()
    assert download.value.suggested_filename == "unimm-seed-3.png"
    with Image.open(download.value.path()) as file:
        assert file.format == "PNG" and equal(file.convert("RGB"), expected)
    visitor.photograph("draw")
    return expected


def edits(visitor, nano, drawn):
    """What was drawn, used as input."""
    visitor.use_in("edit")
    assert visitor.shows(".unimm-input", drawn)
    visitor.fill(seed=5, steps=STEPS)
    visitor.run("edit", EDIT)
    expected = nano.generate(EDIT, images=drawn, seed=5, steps=STEPS).image
    assert visitor.shows(".unimm-result", expected)
    visitor.photograph("edit")
    return expected


def asks(visitor, nano, drawn):
    """A question about the first image, selected in the gallery, which lists the newest first."""
    visitor.tab.locator("#gallery button.thumbnail-item").nth(1).click()
    visitor.tab.locator("#code", has_text=SCENE).wait_for()
    visitor.use_in("ask")
    visitor.run("ask", "what colour is the square?")
    assert visitor.text("#ask-answer") == nano.understand(drawn, "what colour is the square?")
    visitor.photograph("ask")


def thinks(visitor, nano):
    """An image after reasoning, then a text."""
    visitor.open("think")
    visitor.fill(seed=1, steps=STEPS)
    prompt = "as many red circles as 2 + 5 - 4"
    visitor.run("think", prompt)
    expected = nano.generate(prompt, think=True, seed=1, steps=STEPS)
    assert visitor.text("#think-reasoning") == without_marks(expected.text)
    assert visitor.shows(".unimm-result", expected.image)
    visitor.photograph("think")
    visitor.visible(visitor.tab.get_by_label("a text", exact=True)).click()
    visitor.run("think", "what is 2 + 5 - 4?")
    said = nano.understand(None, "what is 2 + 5 - 4?", think=True, seed=1)
    assert visitor.text("#think-reasoning") + visitor.text("#think-answer") == without_marks(said)


def without_marks(reasoning):
    return reasoning.replace("<think>", "").replace("</think>", "").strip()


def chats(visitor, nano):
    """An image in, a text out, then an image out."""
    visitor.open("chat")
    visitor.tab.locator("#use-in-chat").click()
    visitor.tab.locator("#chat-box img").wait_for()
    visitor.say("how many shapes are there?")
    assert visitor.tab.locator("#chat .user img").count() == 1
    visitor.visible(visitor.tab.get_by_label("an image", exact=True)).click()
    visitor.fill(seed=2, steps=STEPS)
    visitor.say("draw three green triangles")
    visitor.tab.locator("#chat .bot img").wait_for()
    visitor.photograph("chat")


def test_a_phone(address, tmp_path):
    """All tabs fit its width; an image is drawn, and used as input."""
    with chromium(address, **PHONE) as tab:
        visitor = Visitor(tab, tmp_path)
        visitor.fill(steps=2)
        visitor.run("draw")
        visitor.tab.locator("#use-in-edit").tap()
        visitor.tab.locator("#edit-status").wait_for()
        for name in ("draw", "edit", "ask", "think", "chat"):
            if not visitor.tab.get_by_role("tab", name=name.capitalize(), exact=True).is_visible():
                visitor.tab.locator(".overflow-menu button").first.tap()
            visitor.open(name)
            assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["viewport"]["width"]
            visitor.photograph(f"phone-{name}")


def test_errors_are_shown_in_the_librarys_words(address, nano, tmp_path):
    with chromium(address, **DESKTOP) as tab:
        visitor = Visitor(tab, tmp_path)
        visitor.fill(width=60, height=64)
        with pytest.raises(ValueError, match="multiples of 16") as caught:
            nano.generate(SCENE, size=(64, 60))
        visitor.run("draw", SCENE, status=str(caught.value))
        visitor.fill(width="", height=64)
        visitor.run("draw", status="got no width: give width and height, or neither for the model's own size")
        visitor.fill(height="tall")
        visitor.run("draw", status="got height 'tall': expected a whole number, or nothing for the model's own")
        visitor.photograph("error")
        visitor.open("edit")
        visitor.run("edit", status="got no image to edit: upload one, or use one of the gallery as input")
        photo = {"name": "photo.png", "mimeType": "image/png", "buffer": b"no image"}
        tab.locator(".unimm-input input[type=file]").first.set_input_files([photo])
        tab.locator(".unimm-input img").first.wait_for(state="attached")
        visitor.run("edit", status=re.compile(r"^cannot read photo\.png: got 8 bytes of another kind"))
        visitor.open("chat")
        visitor.say("", status="got an empty prompt: expected at least a word")


def test_stopping_ends_the_work(address, tmp_path):
    """The engine is free again at once: the next image does not wait for hundreds of steps."""
    with chromium(address, **DESKTOP) as tab:
        visitor = Visitor(tab, tmp_path)
        visitor.fill(steps=250)
        visitor.tab.locator("#draw-run").click()
        visitor.tab.locator("#draw-status", has_text="step").wait_for()
        visitor.tab.locator("#draw-stop").click()
        visitor.await_status("draw", "stopped")
        visitor.fill(steps=2)
        visitor.run("draw", status=DONE)
