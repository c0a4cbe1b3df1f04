"""A model as the harnesses of others ask it: images and a text in, a text out, in batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.evaluation.likelihood import AnswerLikelihood, answer_likelihoods
from unimm.evaluation.setup import load_understanding_model
from unimm.generation.stepwise import RequestMessage
from unimm.generation.text_sampling import TextSampling
from unimm.processing.images.io import load_image

# what harnesses write into a prompt where an image stood; the models here have images ahead of the text
IMAGE_MARKER = "<image>"
# options of other models that a task may give, and that change nothing here
WITHOUT_EFFECT = ("image_aspect_ratio", "use_cache", "do_sample")


class HarnessModel:
    """A loaded model, and how many new tokens an answer of it may have."""

    def __init__(self, name: str, *, dtype: str, device: str, max_tokens: int | None) -> None:
        """name: a bundled name, a folder or a hub id, of a unified model or of a vision-language model. max_tokens: the
        most of any answer, whatever a task asks for; None for the task's number.
        """
        self.model: Any = load_understanding_model(name, device=device, dtype=dtype)
        self.max_tokens = max_tokens

    def answer(
        self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str], sampling: TextSampling
    ) -> list[str]:
        """The answers to a batch of prompts, each about images of its own or none.

        Raises ValueError for prompts that are longer than the model's positions.
        """
        texts = [prompt.replace(IMAGE_MARKER, "").strip() for prompt in prompts]
        return list(self.model.understand([list(some) for some in images], texts, text_sampling=sampling))

    def likelihoods(self, images: Sequence[Image.Image], prompt: str, answers: Sequence[str]) -> list[AnswerLikelihood]:
        """How likely each of some answers to a prompt about images is. Harnesses put a space ahead of an answer, which a
        conversation has none of."""
        message = RequestMessage(role="user", content=(*images, prompt.replace(IMAGE_MARKER, "").strip()))
        return answer_likelihoods(self.model, message, [answer.strip() for answer in answers])

    def sampling(self, options: Mapping[str, Any]) -> TextSampling:
        """The options of a task, in the names of transformers' `generate`, as text sampling: greedy unless they sample.

        Raises ValueError for more than one beam, and for options that are not known.
        """
        given = {name: value for name, value in options.items() if value is not None}
        until = given.pop("until", ())
        beams = given.pop("num_beams", 1)
        if beams != 1:
            raise ValueError(f"got num_beams {beams}: expected 1, texts are decoded without beams here")
        temperature = given.pop("temperature", 0.0) if given.get("do_sample", True) else 0.0
        asked = given.pop("max_new_tokens", None)
        limits = [limit for limit in (asked, self.max_tokens) if limit is not None]
        top_p = given.pop("top_p", None)
        for name in ("temperature", *WITHOUT_EFFECT):
            given.pop(name, None)
        if given:
            raise ValueError(
                f"got the options {', '.join(sorted(given))} of a task: expected until, max_new_tokens, "
                "temperature, top_p, do_sample and num_beams"
            )
        stops = (until,) if isinstance(until, str) else tuple(until)
        return TextSampling(
            temperature=temperature,
            # some tasks write 0 for greedy decoding
            top_p=1.0 if top_p is None or not temperature else top_p,
            max_tokens=min(limits) if limits else None,
            stop=tuple(stop for stop in stops if stop),
        )


def read_visuals(visuals: Sequence[Any] | None) -> list[Image.Image]:
    """The images of a question, which a harness gives as images, or as paths of files.

    Raises ValueError for videos, sounds and anything else.
    """
    found = []
    for one in visuals or ():
        if not isinstance(one, Image.Image | str | Path):
            raise ValueError(f"got {type(one).__name__} for an image: expected images or files; videos are not read")
        found.append(one.convert("RGB") if isinstance(one, Image.Image) else load_image(Path(one)))
    return found


def split_message(message: Sequence[Mapping[str, str]]) -> tuple[list[Image.Image], str]:
    """The images and the text of a message of VLMEvalKit, [{"type": "image", "value": PATH}, {"type": "text", ...}].

    The texts are joined by line breaks; the images come ahead of them, whatever the order. Raises ValueError for other
    types.
    """
    images: list[Image.Image] = []
    texts: list[str] = []
    for part in message:
        kind = part.get("type")
        if kind == "image":
            images += read_visuals([part["value"]])
        elif kind == "text":
            texts.append(part["value"])
        else:
            raise ValueError(f"got a part of type {kind!r} in a message: expected image or text")
    return images, "\n".join(texts)
