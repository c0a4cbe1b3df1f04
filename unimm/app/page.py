"""The page: its tabs, and the gallery beneath them."""

from pathlib import Path
from typing import Any

import gradio as gr

from unimm.app.album import Album
from unimm.app.capabilities import Tab
from unimm.app.chat_tab import ChatTab
from unimm.app.gallery import GalleryPanel, ImageTarget
from unimm.app.request_tab import RequestTab
from unimm.models.load_options import LoadOptions
from unimm.serving.engine import Engine

HEADER = "# unimm\nModels that understand images and generate them."
HOUR = 3600
REQUEST_TABS: tuple[Tab, ...] = ("draw", "edit", "ask", "think")

STYLE = """
.unimm-result img, .unimm-input img {width: 100%; height: 100%; object-fit: contain;}
.unimm-status {margin: 0; padding: .4rem 0; overflow-wrap: anywhere;}
.unimm-alert {color: #b91c1c; font-weight: 600;}
.dark .unimm-alert {color: #fca5a5;}
#chat .image-frame img {width: min(256px, 60vw); height: auto; object-fit: contain;}
#chat button[aria-label="Share"] {display: none;}  /* would send the image to Hugging Face */
button {min-height: 40px;}
"""


def build_page(engine: Engine, *, folder: Path, load: LoadOptions | None = None) -> Any:
    """The page as Gradio's Blocks. folder: for the images that are made, below Gradio's cache, which it serves.

    load: how the models were loaded, for the code that it shows.
    """
    with gr.Blocks(title="unimm", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.Markdown(HEADER)
        album = gr.State(Album(folder), delete_callback=Album.discard)
        with gr.Tabs(selected="draw") as tabs:
            request_tabs: dict[Tab, RequestTab] = {}
            for name in REQUEST_TABS:
                with gr.Tab(name.capitalize(), id=name):
                    request_tabs[name] = RequestTab(name, engine)
            with gr.Tab("Chat", id="chat"):
                chat = ChatTab(engine)
        panel = GalleryPanel(album, load or LoadOptions())
        for tab in request_tabs.values():
            tab.wire(album, panel)
        chat.wire(album, panel)
        targets = {name: ImageTarget(name, tab.images[0]) for name, tab in request_tabs.items() if tab.images}
        panel.wire(tabs, {**targets, "chat": ImageTarget("chat", chat.box, is_chat=True)})
    # every event is the engine's to put in order: it has a queue of its own
    return page.queue(default_concurrency_limit=None, max_size=4 * engine.limits.max_waiting, api_open=False)
