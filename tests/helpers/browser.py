"""The page in a real browser: the command as a process of its own, and Debian's Chromium without a window."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO

import pytest
from PIL import Image

from helpers.serving import ROUNDING, levels_apart

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ([] if CHROMIUM else ["chromium"])
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

DESKTOP = {"viewport": {"width": 1280, "height": 1000}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
WAIT_MS = 30_000
DONE = re.compile(r"^done in [\d.]+ s with seed \d+$")


@contextmanager
def page_server(*arguments):
    """The address of `unimm app`, run as a user runs it; told to stop, it ends well and leaves no files."""
    command = [sys.executable, "-m", "unimm", "app", "--port", "0", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            yield re.search(r"http://\S+", line)[0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@contextmanager
def chromium(address, **options):
    """A tab of Chromium that shows a page. In the end nothing was fetched from anywhere else, and no script failed."""
    from playwright.sync_api import sync_playwright

    asked = []
    faults = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_context(**options).new_page()
        tab.set_default_timeout(WAIT_MS)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        tab.goto(address)
        tab.locator("#draw-run").wait_for()
        yield tab
        browser.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not faults


class Visitor:
    """Someone who uses the page in a tab of the browser."""

    def __init__(self, tab, screenshots):
        self.tab = tab
        self.screenshots = screenshots

    def visible(self, locator):
        """Of what is found the one that is in view."""
        return locator.locator("visible=true").first

    def open(self, name):
        """Choose one of the tabs of the page."""
        self.tab.get_by_role("tab", name=name.capitalize(), exact=True).click()
        self.tab.locator(f"#{name}-status").wait_for()
        self.settle()

    def use_in(self, name):
        """Take the selected image of the gallery as input of a tab, which opens."""
        self.tab.locator(f"#use-in-{name}").click()
        self.tab.locator(f"#{name}-status").wait_for()
        self.settle()

    def settle(self):
        """Wait for two frames: in the one after fields come into view Gradio gives them the values they began with.

        What is typed before that, faster than anyone can type, is lost.
        """
        self.tab.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def fill(self, **values):
        """Fill in settings by their labels, which are opened first."""
        fields = [self.tab.get_by_label(label.capitalize(), exact=True) for label in values]
        if not fields[0].locator("visible=true").count():
            self.visible(self.tab.get_by_role("button", name="Settings")).click()
            self.visible(fields[0]).wait_for()
            self.settle()
        for field, value in zip(fields, values.values(), strict=True):
            self.visible(field).fill(str(value))

    def run(self, name, prompt=None, *, status=DONE):
        """Type a prompt, press the tab's button, and wait for this status."""
        if prompt is not None:
            self.tab.locator(f"#{name}-prompt textarea").fill(prompt)
        self.clear_status(name)
        self.tab.locator(f"#{name}-run").click()
        self.await_status(name, status)

    def say(self, message, *, status=DONE):
        """Send a message in the chat, and wait for this status."""
        self.clear_status("chat")
        self.tab.locator("#chat-box textarea").fill(message)
        self.tab.locator("#chat-box textarea").press("Enter")
        self.await_status("chat", status)

    def clear_status(self, name):
        """Forget a tab's status line, which may say already what is waited for."""
        self.tab.locator(f"#{name}-status p").evaluate("line => { line.textContent = ''; }")

    def await_status(self, name, status):
        """Wait for a tab's status line."""
        from playwright.sync_api import expect

        line = self.tab.locator(f"#{name}-status p")
        expect(line).to_have_text(status, timeout=WAIT_MS)
        return line.inner_text()

    def statuses(self, name):
        """From now on, the list that grows by each text of a tab's status line."""
        self.tab.evaluate(
            """name => {
                window.statuses = [];
                const place = document.querySelector(`#${name}-status`);
                const note = () => window.statuses.push(place.innerText.trim());
                new MutationObserver(note).observe(place, {childList: true, subtree: true, characterData: true});
            }""",
            name,
        )
        return lambda: self.tab.evaluate("window.statuses")

    def image(self, selector):
        """The image that an element shows, from the file that the browser was given."""
        shown = self.visible(self.tab.locator(f"{selector} img"))
        return Image.open(BytesIO(self.tab.request.get(shown.get_attribute("src")).body())).convert("RGB")

    def shows(self, selector, expected):
        """Whether an element shows an image, to rounding; it may still be about to replace the last preview."""
        end = time.monotonic() + WAIT_MS / 1000
        while time.monotonic() < end:
            if levels_apart(self.image(selector), expected) <= ROUNDING:
                return True
            self.tab.wait_for_timeout(100)
        return False

    def code(self):
        """The code beside the gallery."""
        return self.tab.locator("#code .cm-content").inner_text().replace("\n\n", "\n")

    def text(self, selector):
        """What a text field holds."""
        return self.tab.locator(f"{selector} textarea").input_value()

    def photograph(self, name):
        """Keep a screenshot of the whole page."""
        self.tab.screenshot(path=self.screenshots / f"{name}.png", full_page=True)
