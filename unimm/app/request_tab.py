"""The tabs draw, edit, ask and think: fields on one side, the answer as it comes on the other."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from unimm.app.album import Album
from unimm.app.capabilities import IMAGE_ANSWER, TEXT_ANSWER, Tab, models_for
from unimm.app.fields import ImageFields, TextFields, Values, image_field, model_field, result_field
from unimm.app.gallery import GalleryPanel
from unimm.app.progress import SHOWN_ERRORS, Progress, error_html, follow, status_html
from unimm.app.requests import PageRequest, read_images, tab_request
from unimm.serving.engine import Engine

PROMPTS: dict[Tab, str] = {
    "draw": "a red circle left of a blue square",
    "edit": "make the circle green",
    "ask": "how many shapes are there?",
    "think": "as many red circles as 2 + 5 - 4",
}
INPUT_IMAGES: dict[Tab, tuple[str, ...]] = {
    "draw": (),
    "edit": ("Image to edit", "Another image"),
    "ask": ("Image",),
    "think": ("Image, if there is one",),
}


class RequestTab:
    """One of these tabs. Made inside of its gr.Tab; `wire` connects it once the gallery is made."""

    def __init__(self, tab: Tab, engine: Engine):
        self.tab = tab
        self.engine = engine
        self.text_fields: TextFields | None = None
        self.image_fields: ImageFields | None = None
        names = models_for(engine.models, tab)
        if not names:
            gr.Markdown(f"None of the models here can {tab}. Start the page with one that can, such as bagel-nano.")
        with gr.Row():
            with gr.Column():
                self._build_inputs(names)
            with gr.Column():
                self._build_outputs()

    def _build_inputs(self, names: list[str]) -> None:
        tab = self.tab
        self.model = model_field(names)
        labels = INPUT_IMAGES[tab]
        self.images = [image_field(label) for label in labels[:1]]
        for label in labels[1:]:
            with gr.Accordion(label, open=False):
                self.images.append(image_field(label))
        self.prompt = gr.Textbox(
            PROMPTS[tab], label="Question" if tab == "ask" else "Prompt", lines=2, elem_id=f"{tab}-prompt"
        )
        self.answer_kind = gr.Radio(
            [IMAGE_ANSWER, TEXT_ANSWER], value=IMAGE_ANSWER, label="Answer with", visible=tab == "think"
        )
        if tab == "ask":
            self.text_fields = TextFields()
        else:
            self.image_fields = ImageFields()
        with gr.Row():
            self.run_button = gr.Button(tab.capitalize(), variant="primary", elem_id=f"{tab}-run", min_width=100)
            self.stop_button = gr.Button("Stop", variant="stop", elem_id=f"{tab}-stop", min_width=100)

    def _build_outputs(self) -> None:
        tab = self.tab
        self.status = gr.HTML(status_html("ready"), elem_id=f"{tab}-status")
        self.reasoning = gr.Textbox(
            label="Reasoning", lines=3, interactive=False, visible=tab == "think", elem_id=f"{tab}-reasoning"
        )
        self.answer = gr.Textbox(
            label="Answer", lines=3, interactive=False, visible=tab == "ask", elem_id=f"{tab}-answer"
        )
        self.result = result_field() if tab != "ask" else None

    def wire(self, album: Any, panel: GalleryPanel) -> None:
        """Connect the fields to the engine and to the gallery."""
        fields = self.text_fields or self.image_fields
        assert fields is not None
        shown = {self.status, self.reasoning, self.answer} | ({self.result} if self.result else set())

        async def run(values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
            found: Album = values[album]
            try:
                asked = await asyncio.to_thread(self._request, values, found)
                progress = Progress()
                before = None
                async for progress in follow(self.engine, asked, client=request.session_hash or ""):
                    yield self._show(progress, before)
                    before = progress
            except SHOWN_ERRORS as error:
                yield {self.status: error_html(error)}
                return
            for image, recipe in zip(progress.images, asked.recipes, strict=True):
                caption = f"{values[self.prompt]} - {asked.model}, seed {recipe.seed}"
                yield panel.updates(found, found.add(image, recipe, caption))

        running = gr.on(
            [self.run_button.click, self.prompt.submit],
            run,
            inputs={album, self.model, self.prompt, self.answer_kind, *self.images, *fields.inputs},
            outputs=shown | panel.outputs,
            concurrency_limit=None,
            api_visibility="private",
            show_progress="hidden",
        )
        self.stop_button.click(None, cancels=[running])
        self.stop_button.click(
            lambda: status_html("stopped"), outputs=self.status, queue=False, api_visibility="private"
        )
        if self.tab == "think":
            self.answer_kind.change(
                self._show_answer_kind,
                inputs=self.answer_kind,
                outputs=[self.result, self.answer],
                queue=False,
                api_visibility="private",
            )

    def _request(self, values: Values, album: Album) -> PageRequest:
        images = read_images([values[one] for one in self.images], self.engine.limits)
        is_text = self.tab == "ask" or values[self.answer_kind] == TEXT_ANSWER
        sampling = None
        if self.text_fields is not None:
            settings, sampling = self.text_fields.read(values)
        else:
            assert self.image_fields is not None
            settings = self.image_fields.read(values)
        return tab_request(
            self.tab,
            values[self.model],
            values[self.prompt],
            images,
            settings,
            album=album,
            output="text" if is_text else "image",
            text_sampling=sampling,
        )

    def _show(self, progress: Progress, before: Progress | None) -> dict[Any, Any]:
        values: dict[Any, Any] = {
            self.status: status_html(progress.status),
            self.reasoning: progress.thoughts,
            self.answer: progress.text,
        }
        # an image that is shown again is written again, perhaps while the browser reads it
        if self.result is not None and (before is None or progress.latest_image is not before.latest_image):
            values[self.result] = progress.latest_image
        return values

    @staticmethod
    def _show_answer_kind(kind: str) -> tuple[Any, Any]:
        return gr.Image(visible=kind == IMAGE_ANSWER), gr.Textbox(visible=kind == TEXT_ANSWER)
