"""Images to tensors and back: loading, cropping, normalising."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 64_000_000  # an image above this is refused before it is decoded
# PIL's names of the formats that images are opened from, whatever a file is called: PIL decodes these itself. Of its
# others some start another program (EPS starts Ghostscript on the file), and few are met.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def load_image(image: Image.Image | str | Path) -> Image.Image:
    """An RGB image from an image or a path: upright as its EXIF says, transparency on white, 16 bits to 8.

    Whole numbers of 32 bits are taken for 16 where one is above 255. Raises ValueError for a missing or broken file, for
    a format that is not one of IMAGE_FORMATS, for more than MAX_PIXELS pixels or none, and for an image of floats,
    whose range is unknown.
    """
    if isinstance(image, str | Path):
        try:
            with Image.open(image, formats=_available_formats()) as opened:
                return load_image(opened)
        except FileNotFoundError:
            raise ValueError(f"no image at {image}: expected a path to a file, or a PIL image") from None
        except UnidentifiedImageError as error:
            raise ValueError(
                f"cannot read {image} as an image: got contents of another kind, expected {', '.join(IMAGE_FORMATS)}; "
                "convert it to one of these"
            ) from error
        except (Image.DecompressionBombError, OSError) as error:
            raise ValueError(f"cannot read {image} as an image: {error}") from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"got an image of type {type(image).__name__}: expected a PIL image or a path")
    # an image that PIL opened decodes its file only when it is loaded
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.format not in IMAGE_FORMATS:
        raise ValueError(
            f"got an image file of format {image.format}: expected {', '.join(IMAGE_FORMATS)}; convert it to one of "
            "these, or call its load() first if you trust the file"
        )
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"got an image of {width}x{height}: expected at most {MAX_PIXELS:,} pixels; resize it first")
    if not width * height:
        raise ValueError(f"got an image of {width}x{height}: expected a pixel or more")
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the image is broken or cut short: {error}") from error
    if image.mode == "F":
        raise ValueError("got an image of floats (mode F): expected 8 or 16 bits; scale it to 0..255 and make it uint8")
    return _to_rgb(ImageOps.exif_transpose(image))


def _available_formats() -> list[str]:
    """Those of IMAGE_FORMATS that this PIL knows: AVIF came with 11.3."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # PIL's own conversion clips at 255
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        levels = levels // 257 if image.mode != "I" or levels.max() > 255 else levels
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image whose short side is resized to `size` (PIL's bicubic)."""
    shortest = min(image.size)
    width, height = (round(side / shortest * size) for side in image.size)
    left = (width - size) // 2
    top = (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


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
    originals."""
    values = ((image.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return Image.fromarray(rearrange(values, "c h w -> h w c").cpu().numpy())
