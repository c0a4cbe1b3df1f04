"""Requests as the tests of serving make them, and what an answer is compared with."""

import numpy as np
from PIL import Image

from unimm.generation.stepwise import ModelRequest, RequestMessage


def asks(*content: str | Image.Image, **options) -> ModelRequest:
    """One message of the user's: images and texts in order."""
    return ModelRequest(messages=(RequestMessage(role="user", content=content),), **options)


def draws(*content: str | Image.Image, **options) -> ModelRequest:
    """The same, answered by an image."""
    return asks(*content, outputs=("image",), **options)


def levels_apart(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two images of one size, in levels of 255."""
    assert a.size == b.size
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


# levels that rounding moves a pixel: a value at the edge of a level falls on either side of it
ROUNDING = 1
