"""The gallery beneath the tabs: the images of this visit, each with its download, its code, and a way back in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from unimm.app.album import Album, AlbumImage
from unimm.app.capabilities import Tab
from unimm.app.progress import status_html
from unimm.app.scripts import python_script
from unimm.models.load_options import LoadOptions


@dataclass(frozen=True)
class ImageTarget:
    """Where an image of the gallery goes as input: a tab, its field, and the field's value for a path."""

    tab: Tab
    field: Any
    is_chat: bool = False


class GalleryPanel:
    """The images, newest first, and what can be done with the one that is selected."""

    def __init__(self, album: Any, load: LoadOptions) -> None:
        self.album = album
        self.load = load
        self.selected = gr.State(None)  # the path of the selected image's file
        gr.Markdown(
            "## Gallery\nWhat you make is listed here until you close the page. Select an image to go on with it."
        )
        with gr.Row():
            with gr.Column():
                self.gallery = gr.Gallery(
                    label="Images of this visit",
                    show_label=False,
                    format="png",
                    columns=4,
                    fit_columns=False,
                    height=240,
                    object_fit="contain",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                )
            with gr.Column():
                self.caption = gr.HTML(status_html("no image yet"))
                gr.Markdown("Use as input:")
                with gr.Row():
                    self.buttons: dict[Tab, Any] = {
                        tab: gr.Button(
                            tab.capitalize(), size="md", min_width=70, interactive=False, elem_id=f"use-in-{tab}"
                        )
                        for tab in ("edit", "ask", "think", "chat")
                    }
                self.download = gr.DownloadButton("Download PNG", size="md", interactive=False, elem_id="download")
                self.code = gr.Code(
                    label="Python code that makes it again",
                    language="python",
                    interactive=False,
                    wrap_lines=True,
                    lines=4,
                    elem_id="code",
                )

    @property
    def outputs(self) -> set[Any]:
        """What `updates` sets."""
        return {self.gallery, self.selected, self.caption, self.download, self.code, *self.buttons.values()}

    def updates(self, album: Album, entry: AlbumImage) -> dict[Any, Any]:
        """The values that show an album with one image selected."""
        images = [(str(one.path), one.caption) for one in album.images]
        return {self.gallery: gr.Gallery(value=images, selected_index=None), **self.details(entry)}

    def details(self, entry: AlbumImage) -> dict[Any, Any]:
        """The values that show one image."""
        return {
            self.selected: str(entry.path),
            self.caption: status_html(entry.caption),
            self.download: gr.DownloadButton(value=str(entry.path), interactive=True),
            self.code: python_script(entry.recipe, load=self.load),
            **{button: gr.Button(interactive=True) for button in self.buttons.values()},
        }

    def wire(self, tabs: Any, targets: Mapping[Tab, ImageTarget]) -> None:
        """Connect the selection and the buttons."""

        def select(album: Album, event: gr.SelectData) -> dict[Any, Any]:
            return self.details(album.images[event.index])

        self.gallery.select(
            select,
            inputs=self.album,
            outputs=self.outputs - {self.gallery},
            api_visibility="private",
            show_progress="hidden",
        )
        for name, button in self.buttons.items():
            target = targets[name]
            button.click(
                self._use(tabs, target),
                inputs=self.selected,
                outputs=[tabs, target.field],
                api_visibility="private",
                show_progress="hidden",
            )

    @staticmethod
    def _use(tabs: Any, target: ImageTarget) -> Any:
        def use(path: str) -> dict[Any, Any]:
            value = {"text": "", "files": [path]} if target.is_chat else path
            return {tabs: gr.Tabs(selected=target.tab), target.field: value}

        return use
