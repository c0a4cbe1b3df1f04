"""Images in requests and answers: data URIs, uploads, base64; within limits, and never a path."""

import base64
import binascii
import re
from io import BytesIO
from typing import Any

from PIL import Image

from unimm.processing.images.io import load_image_bytes, read_image_size
from unimm.serving.limits import ServingLimits

DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


def decode_data_uri(uri: str, limits: ServingLimits, *, place: str) -> Image.Image:
    """The RGB image of a data URI. Raises ValueError for anything else, and for an image beyond the limits."""
    match = DATA_URI.match(uri)
    if match is None:
        raise ValueError(
            f"got {uri!r:.60} for {place}: expected a data URI, as in data:image/png;base64,...; files and other "
            "addresses are not read"
        )
    try:
        data = base64.b64decode(uri[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"cannot read {place}: its base64 is broken ({error})") from error
    return decode_image(data, limits, place=place)


def decode_image(data: bytes, limits: ServingLimits, *, place: str) -> Image.Image:
    """The RGB image of a file's bytes; its size is checked before it is decoded. Raises ValueError."""
    width, height = read_image_size(data, place=place)
    if width * height > limits.max_input_pixels:
        raise ValueError(
            f"got {place} of {width}x{height}: expected at most {limits.max_input_pixels:,} pixels; resize it first"
        )
    return load_image_bytes(data, place=place)


def encode_image(image: Image.Image, output_format: str = "png", compression: int | None = None) -> str:
    """An image's file in base64. compression: 0 to 100, of JPEG and WebP; 100, the least loss, unless given."""
    file = BytesIO()
    options: dict[str, Any] = {} if output_format == "png" else {"quality": 100 if compression is None else compression}
    image.save(file, format=output_format.upper(), **options)
    return base64.b64encode(file.getvalue()).decode("ascii")


def data_uri(image: Image.Image, output_format: str = "png") -> str:
    """An image as a data URI."""
    return f"data:image/{output_format};base64,{encode_image(image, output_format)}"
