"""Records by hand for the tests."""

import random

from PIL import Image

from helpers.toys import picture
from unimm.data.records import Record, RecordImage, RecordPart, RecordText
from unimm.data.shapes import Example


def record(*parts: RecordPart, edit_weights: bool = False) -> Record:
    return Record(parts=parts, source="memory", row=0, edit_weights=edit_weights)


def text(*wordings: str, **fields) -> RecordText:
    return RecordText(wordings=wordings, **fields)


def said(words: str, **fields) -> RecordText:
    return RecordText(wordings=(words,), loss=True, role="assistant", **fields)


def image(*, loss: bool = False, size: tuple[int, int] = (30, 22), seed: int = 0) -> RecordImage:
    return RecordImage(data=picture(*size, seed=seed), loss=loss)


def as_record(one: Example, **fields) -> Record:
    """An example of the shapes world as a dataset would have it."""
    images = [RecordImage(data=Image.fromarray(pixels)) for pixels in one.images]
    if one.target is not None:
        return record(*images, text(one.prompt), RecordImage(data=Image.fromarray(one.target), loss=True), **fields)
    return record(*images, text(one.prompt), said(one.answer), **fields)


def dice(seed: int = 0) -> random.Random:
    return random.Random(seed)
