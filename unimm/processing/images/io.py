"""Images to tensors and back: loading, cropping, normalising."""

import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from unimm.checkpoint.valueless import values_left_out

MAX_PIXELS = 64_000_000  # an image above this is refused before it is decoded
# PIL's names of the formats that images are opened from, whatever a file is called: PIL decodes these itself. Of its
# others some start another program (EPS starts Ghostscript on the file), and few are met.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# what PIL raises over rubbish in a file, beside its own errors; most of this list is its own, for EXIF in a JPEG
RUBBISH = (
    struct.error,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    OSError,
    EOFError,
    AssertionError,
)
# modes whose colours are multiplied by the transparency, and those of the same colours plain
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
# how an image is turned that EXIF gives this orientation
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# those of them that exchange width and height
TRANSPOSED = (5, 6, 7, 8)


def load_image(image: Image.Image | str | Path, *, place: str = "an image") -> Image.Image:
    """An RGB image from an image or a path: upright as its EXIF says, transparency on white, 16 bits to 8.

    place: which of several it is, for messages. Whole numbers of 32 bits are taken for 16 where one is above 255. Raises
    ValueError for a missing or broken file, for a format that is not one of IMAGE_FORMATS, for more than MAX_PIXELS
    pixels or none, and for an image of floats, whose range is unknown.
    """
    if isinstance(image, str | Path):
        try:
            opened = _open(image, f"{image} as {place}")
        except FileNotFoundError:
            where = "" if place == "an image" else f", {place}"
            raise ValueError(f"no image at {image}{where}: expected a path to a file, or a PIL image") from None
        with opened:
            return load_image(opened, place=f"{place}, {image},")
    if not isinstance(image, Image.Image):
        raise ValueError(f"got {place} of type {type(image).__name__}: expected a PIL image or a path")
    # an image that PIL opened decodes its file only when it is loaded
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.format not in IMAGE_FORMATS:
        raise ValueError(
            f"got {place}, a file of format {image.format}: expected {', '.join(IMAGE_FORMATS)}; convert it to one of "
            "these, or call its load() first if you trust the file"
        )
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"got {place} of {width}x{height}: expected at most {MAX_PIXELS:,} pixels; resize it first")
    if not width * height:
        raise ValueError(f"got {place} of {width}x{height}: expected a pixel or more")
    try:
        image.load()
    except RUBBISH as error:
        raise ValueError(f"got {place} that is broken or cut short: {error}") from error
    if image.mode == "F":
        raise ValueError(f"got {place} of floats (mode F): expected 8 or 16 bits; scale it to 0..255 and make it uint8")
    turn = UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image if turn is None else image.transpose(turn))
    rgb.info = {}  # the orientation and the transparency are used up: the next who loads it leaves it as it is
    return rgb


def load_image_bytes(data: bytes, *, place: str = "an image") -> Image.Image:
    """An RGB image, as `load_image` gives it, from the bytes of a file. Raises ValueError for the same reasons."""
    with _open(BytesIO(data), place) as opened:
        return load_image(opened, place=place)


def _open(file: str | Path | BytesIO, what: str) -> ImageFile.ImageFile:
    """A file's header. what: the file, for messages. Raises FileNotFoundError, and ValueError for what is no image."""
    try:
        return Image.open(file, formats=_available_formats())
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        got = f"{len(file.getbuffer()):,} bytes" if isinstance(file, BytesIO) else "contents"
        raise ValueError(
            f"cannot read {what}: got {got} of another kind, expected {', '.join(IMAGE_FORMATS)}; convert it to one of "
            "these"
        ) from error
    except (Image.DecompressionBombError, *RUBBISH) as error:
        raise ValueError(f"cannot read {what}: {error}") from error


def read_image_size(image: Path | bytes, *, place: str = "an image") -> tuple[int, int]:
    """(width, height) of an image's file, upright, out of its first bytes where the format has them there.

    Raises ValueError for a missing file, for one whose format is not one of IMAGE_FORMATS, and for a broken header.
    """
    what = f"{place}, {image}" if isinstance(image, Path) else place
    file = image if isinstance(image, Path) else BytesIO(image)
    try:
        with _open(file, what) as opened:
            width, height = opened.size
            return (height, width) if _orientation(opened) in TRANSPOSED else (width, height)
    except FileNotFoundError:
        raise ValueError(f"cannot read {what}: no such file") from None


def load_images(images: Sequence, *, of: str = "", noun: str = "image") -> list[Image.Image]:
    """RGB images as `load_image` gives them; its errors say which of them it was. of: what they belong to. noun: what one
    is called, "image" or "mask"."""
    n = len(images)
    behind = of and f" of {of}"
    if n == 1:
        alone = "an image" if noun == "image" else f"a {noun}"
        return [load_image(images[0], place=f"the {noun}{behind}" if of else alone)]
    return [load_image(image, place=f"{noun} {i + 1}{behind or f' of {n}'}") for i, image in enumerate(images)]


def _orientation(image: Image.Image) -> Any:
    """The number of EXIF's orientation, or of XMP's; 1, upright, where it cannot be read: viewers show such pictures."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except RUBBISH:
        return 1
    return found if isinstance(found, int) else 1


def _available_formats() -> list[str]:
    """Those of IMAGE_FORMATS that this PIL knows: AVIF came with 11.3."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    key = _transparent_value(image)
    if image.mode.startswith("I"):  # PIL's own conversion clips at 255
        values = np.asarray(image).astype(np.int64)
        levels = values.clip(0, 65535)
        levels = levels // 257 if image.mode != "I" or levels.max() > 255 else levels
        return Image.fromarray(np.where(values == key, 255, levels).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or key is not None:
        image = _with_transparency(image, key).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image)
        image = white
    elif "transparency" in image.info:
        image = _with_transparency(image, None)
    return image.convert("RGB")


def _transparent_value(image: Image.Image) -> Any:
    """The transparent value among an image's, or bytes of a palette's transparency; None for none.

    None, too, for what does not fit the mode: tools hand a palette's on with `info`. Of a colour of 16 bits the pixels
    have kept the upper 8, and so does the value.
    """
    value = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(value, tuple | list) and len(value) == 3:
        if not all(isinstance(one, int) and 0 <= one <= 65535 for one in value):
            return None
        return tuple(one >> 8 for one in value) if max(value) > 255 else tuple(value)
    if image.mode == "P" and isinstance(value, bytes) and len(value) <= 256:
        return value
    limit = {"1": 255, "L": 255, "P": 255}.get(image.mode, 65535 if image.mode.startswith("I") else -1)
    return value if isinstance(value, int) and 0 <= value <= limit else None


def _with_transparency(image: Image.Image, value: Any) -> Image.Image:
    image = image.copy()
    image.info = {} if value is None else {"transparency": value}
    return image


def resize(image: Image.Image, size: tuple[int, int], filter_: int = Image.Resampling.BICUBIC) -> Image.Image:
    """An image in one of PIL's filters, with the pixels of Pillow 13 whatever Pillow is installed. size: (width, height).

    Between its two passes Pillow rounds to 8 bits. Up to 12 it resized rows first, always; since 13 columns, where the
    height is reduced by more than twice as many pixels as the width.
    """
    width, height = size
    reduced = image.height - height
    columns_first = reduced > 0 and reduced > 2 * (image.width - width)
    between = (image.width, height) if columns_first else (width, image.height)
    return image.resize(between, filter_).resize(size, filter_)


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """The middle of an image that is resized (PIL's bicubic) until it covers `size` in both directions.

    size: (height, width), or the side of a square.
    """
    height, width = (size, size) if isinstance(size, int) else size
    # the direction that has to be scaled up more, or down less
    wanted, side = (width, image.width) if width * image.height > height * image.width else (height, image.height)
    resized_width, resized_height = (round(one / side * wanted) for one in image.size)
    if resized_width * resized_height > MAX_PIXELS:
        raise ValueError(
            f"got an image of {image.width}x{image.height} to crop to {width}x{height}: resized to cover that, it has "
            f"{resized_width * resized_height:,} pixels, expected at most {MAX_PIXELS:,}; cut it nearer to that ratio"
        )
    left = (resized_width - width) // 2
    top = (resized_height - height) // 2
    resized = resize(image, (resized_width, resized_height))
    return resized.crop((left, top, left + width, top + height))


def normalize(image: Image.Image, *, mean: Sequence[float], std: Sequence[float], rescale_factor: float) -> Tensor:
    """An image's values times `rescale_factor`, minus the mean, over the standard deviation: [3, h, w] float32."""
    # the product in float64, the rest in float32, as in the originals
    values = (np.asarray(image).astype(np.float64) * rescale_factor).astype(np.float32)
    normal = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(rearrange(normal, "h w c -> c h w").copy())


def pil_to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as [3, h, w] float32 in [-1, 1]."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def tensor_to_pil(image: Tensor) -> Image.Image:
    """[3, h, w] in [-1, 1] as an image; values are clamped and truncated, not rounded, to 8 bits, as in the
    originals. Without values it is black."""
    values = ((image.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    if values_left_out():
        return Image.new("RGB", (image.shape[2], image.shape[1]))
    return Image.fromarray(rearrange(values, "c h w -> h w c").cpu().numpy())
