"""The tab chat: a conversation in which texts and images go both ways."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from unimm.app.album import Album
from unimm.app.capabilities import CHAT_OUTPUTS, TEXT_ANSWER, chat_answers, models_for
from unimm.app.fields import ImageFields, Values, model_field
from unimm.app.gallery import GalleryPanel
from unimm.app.progress import SHOWN_ERRORS, Progress, error_html, follow, status_html
from unimm.app.requests import PageMessage, PageRequest, conversation_request
from unimm.serving.engine import Engine

EMPTY_MESSAGE: dict[str, Any] = {"text": "", "files": []}


class ChatTab:
    """The conversation, the box for the next message, and what the answer is to be."""

    def __init__(self, engine: Engine):
        self.engine = engine
        names = models_for(engine.models, "chat")
        answers = chat_answers(engine.models[names[0]]) if names else [TEXT_ANSWER]
        self.messages = gr.State([])
        self.model = model_field(names)
        self.chatbot = gr.Chatbot(
            label="Chat", height=460, allow_tags=False, feedback_options=None, buttons=["copy"], elem_id="chat"
        )
        self.status = gr.HTML(status_html("ready"), elem_id="chat-status")
        self.box = gr.MultimodalTextbox(
            label="Message",
            show_label=False,
            placeholder="a message, and images to it",
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            elem_id="chat-box",
        )
        self.answer_kind = gr.Radio(answers, value=TEXT_ANSWER, label="Answer with", elem_id="chat-answer")
        self.fields = ImageFields()
        with gr.Row():
            self.stop_button = gr.Button("Stop", variant="stop", min_width=100)
            self.clear_button = gr.Button("New chat", min_width=100)

    def wire(self, album: Any, panel: GalleryPanel) -> None:
        """Connect the fields to the engine and to the gallery."""

        async def run(values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
            found: Album = values[album]
            messages: list[PageMessage] = values[self.messages]
            typed = values[self.box]
            asked_messages = [*messages, typed_message(typed)]
            before = gradio_messages(asked_messages)
            yield {self.chatbot: before, self.box: EMPTY_MESSAGE, self.status: status_html("waiting")}
            files = ImageFiles(self.chatbot.GRADIO_CACHE)
            try:
                asked = await asyncio.to_thread(self._request, values, asked_messages, found)
                progress = Progress()
                async for progress in follow(self.engine, asked, client=request.session_hash or ""):
                    now = [*before, *partial_answer(progress, files)]
                    yield {self.chatbot: now, self.status: status_html(progress.status)}
            except SHOWN_ERRORS as error:
                yield {self.chatbot: gradio_messages(messages), self.box: typed, self.status: error_html(error)}
                return
            answer, updates = keep_answer(asked, progress, found, panel)
            asked_messages.append(answer)
            yield {self.messages: asked_messages, self.chatbot: gradio_messages(asked_messages), **updates}

        private: dict[str, Any] = dict(queue=False, api_visibility="private", show_progress="hidden")
        running = self.box.submit(
            run,
            inputs={album, self.messages, self.model, self.box, self.answer_kind, *self.fields.inputs},
            outputs={self.messages, self.chatbot, self.box, self.status} | panel.outputs,
            concurrency_limit=None,
            api_visibility="private",
            show_progress="hidden",
        )
        self.stop_button.click(None, cancels=[running])
        self.stop_button.click(
            lambda messages: (gradio_messages(messages), status_html("stopped")),
            inputs=self.messages,
            outputs=[self.chatbot, self.status],
            **private,
        )
        gr.on([self.clear_button.click, self.chatbot.clear], None, cancels=[running])
        gr.on(
            [self.clear_button.click, self.chatbot.clear],
            lambda: ([], [], status_html("ready")),
            outputs=[self.messages, self.chatbot, self.status],
            **private,
        )
        self.model.change(self._show_answers, inputs=self.model, outputs=self.answer_kind, **private)

    def _request(self, values: Values, messages: Sequence[PageMessage], album: Album) -> PageRequest:
        return conversation_request(
            values[self.model],
            messages,
            CHAT_OUTPUTS[values[self.answer_kind]],
            self.fields.read(values),
            album=album,
            limits=self.engine.limits,
        )

    def _show_answers(self, name: str) -> Any:
        return gr.Radio(choices=chat_answers(self.engine.models[name]), value=TEXT_ANSWER)


class ImageFiles:
    """Files in Gradio's cache of the images of an answer on its way; each is written once, since a browser may read it."""

    def __init__(self, folder: str):
        self.folder = folder
        self._written: list[tuple[Image.Image, Path]] = []

    def path(self, image: Image.Image) -> Path:
        """An image's file."""
        for one, path in self._written:
            if one is image:
                return path
        path = Path(gr.processing_utils.save_pil_to_cache(image, cache_dir=self.folder, format="png"))
        self._written.append((image, path))
        return path


def partial_answer(progress: Progress, files: ImageFiles) -> list[dict[str, Any]]:
    """The answer so far, as Gradio's messages."""
    outputs = [*progress.outputs, *([progress.preview] if progress.preview else [])]
    return [
        gradio_message("assistant", one if isinstance(one, str) else files.path(one)) for one in outputs if one != ""
    ]


def typed_message(typed: dict[str, Any]) -> PageMessage:
    """What was typed and attached, as a message: the images, then the text."""
    text = typed["text"].strip()
    return PageMessage("user", (*map(Path, typed["files"]), *([text] if text else [])))


def keep_answer(
    asked: PageRequest, progress: Progress, album: Album, panel: GalleryPanel
) -> tuple[PageMessage, dict[Any, Any]]:
    """A finished answer as a message, its images in the album, and how the gallery shows that."""
    recipes = iter(asked.recipes)
    updates: dict[Any, Any] = {}
    pieces: list[str | Path] = []
    for output in progress.outputs:
        if isinstance(output, str):
            pieces.append(output)
            continue
        recipe = next(recipes)
        seed = recipe.seed + len(recipe.outputs) - 1
        entry = album.add(output, recipe, f"chat, message {len(asked.request.messages)} - {asked.model}, seed {seed}")
        updates = panel.updates(album, entry)
        pieces.append(entry.path)
    return PageMessage("assistant", tuple(pieces)), updates


def gradio_messages(messages: Sequence[PageMessage]) -> list[dict[str, Any]]:
    """Messages as Gradio's chat takes them, a text or an image each."""
    return [gradio_message(message.role, piece) for message in messages for piece in message.pieces]


def gradio_message(role: str, piece: str | Path) -> dict[str, Any]:
    """One of them."""
    return {"role": role, "content": piece if isinstance(piece, str) else {"path": str(piece)}}
