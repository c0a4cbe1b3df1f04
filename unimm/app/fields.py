"""Groups of fields that several tabs have, and what they say."""

import random
from collections.abc import Mapping
from typing import Any

import gradio as gr

from unimm.app.requests import ImageSettings, parse_decimal, parse_whole
from unimm.generation.text_sampling import TextSampling

Values = Mapping[Any, Any]  # of the fields that an event reads
MAX_SEED = 2**31 - 1


class ImageFields:
    """The settings of an image."""

    def __init__(self) -> None:
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                self.seed = number_field("Seed", value="0")
                new_seed = gr.Button("New seed", size="md", min_width=100)
            with gr.Row():
                self.width = number_field("Width")
                self.height = number_field("Height")
            with gr.Row():
                self.steps = number_field("Steps")
                self.guidance = number_field("Guidance")
        new_seed.click(random_seed, outputs=self.seed, queue=False, api_visibility="private", show_progress="hidden")

    @property
    def inputs(self) -> set[Any]:
        """The fields."""
        return {self.seed, self.width, self.height, self.steps, self.guidance}

    def read(self, values: Values) -> ImageSettings:
        """What they say. Raises ValueError for what is no number."""
        return ImageSettings(
            seed=parse_whole(values[self.seed], "seed"),
            width=parse_whole(values[self.width], "width"),
            height=parse_whole(values[self.height], "height"),
            steps=parse_whole(values[self.steps], "steps"),
            guidance=parse_decimal(values[self.guidance], "guidance"),
        )


class TextFields:
    """The settings of an answer in words."""

    def __init__(self) -> None:
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                self.temperature = number_field("Temperature", value="0")
                self.top_p = number_field("Top p", value="1")
            with gr.Row():
                self.max_tokens = number_field("Most tokens")
                self.seed = number_field("Seed", value="0")

    @property
    def inputs(self) -> set[Any]:
        """The fields."""
        return {self.temperature, self.top_p, self.max_tokens, self.seed}

    def read(self, values: Values) -> tuple[ImageSettings, TextSampling]:
        """What they say; of the image's settings the seed alone. Raises ValueError for what is no number."""
        numbers: dict[str, Any] = {
            "temperature": parse_decimal(values[self.temperature], "temperature"),
            "top_p": parse_decimal(values[self.top_p], "top p"),
            "max_tokens": parse_whole(values[self.max_tokens], "most tokens"),
        }
        sampling = TextSampling(**{name: number for name, number in numbers.items() if number is not None})
        return ImageSettings(seed=parse_whole(values[self.seed], "seed")), sampling


def number_field(label: str, *, value: str = "") -> Any:
    """A field for a number, or for nothing: Gradio's own takes an empty one for 0."""
    return gr.Textbox(value, label=label, placeholder="model's own", max_lines=1, min_width=100)


def random_seed() -> str:
    """A seed that nobody chose."""
    return str(random.SystemRandom().randint(0, MAX_SEED))


def model_field(names: list[str]) -> Any:
    """The choice of a model; the first unless another is chosen."""
    return gr.Dropdown(names, value=names[0] if names else None, label="Model", interactive=True)


def image_field(label: str) -> Any:
    """An image to upload or to paste. Its value is the path of its file as it came, which may hold no image at all."""
    field = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        height=260,
        elem_classes="unimm-input",
    )
    # Gradio's own opens the file, and speaks of its own types where that fails
    field.preprocess = uploaded_path
    return field


def uploaded_path(upload: Any) -> str | None:
    """The path of what was uploaded into a field, if anything was."""
    return None if upload is None else upload.path


def result_field() -> Any:
    """The image that a tab makes, as it comes."""
    return gr.Image(
        label="Image",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        height=380,
        elem_classes="unimm-result",
    )
