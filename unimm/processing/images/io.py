"""Pictures to pixels: opening, resizing by the released rule, patches and their places; and back to pictures."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 64_000_000  # an image above this is refused before it is decoded


def open_image(image: Image.Image | str | Path) -> Image.Image:
    """An RGB picture from a picture or a path: upright as its EXIF says, transparency on white, 16 bits to 8.

    Whole numbers of 32 bits are taken for 16 where one is above 255. Raises ValueError for a missing, broken or unknown
    file, for more than MAX_PIXELS pixels or none, and for a picture of floats, whose range nobody knows.
    """
    if isinstance(image, str | Path):
        try:
            with Image.open(image) as opened:
                return open_image(opened)
        except FileNotFoundError:
            raise ValueError(f"no image at {image}: expected a path to a file, or a PIL image") from None
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
            raise ValueError(f"cannot read {image} as an image: {error}") from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"got an image of type {type(image).__name__}: expected a PIL image or a path")
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


@dataclass(frozen=True, kw_only=True)
class Resize:
    """The released resize: sides between `shortest` and `longest` where both fit, multiples of `stride`, few pixels."""

    longest: int
    shortest: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024

    FILES: ClassVar = {
        "longest": "max_image_size",
        "shortest": "min_image_size",
        "stride": "image_stride",
        "max_pixels": "max_pixels",
    }

    @classmethod
    def from_files(cls, files: Mapping[str, int], *, longest: int, shortest: int, stride: int) -> "Resize":
        """Read a vae_transform or vit_transform; the numbers given for what is missing."""
        known = {ours: files[theirs] for ours, theirs in cls.FILES.items() if theirs in files}
        return cls(**{"longest": longest, "shortest": shortest, "stride": stride, **known})

    def to_files(self) -> dict[str, int]:
        """The mapping that `from_files` reads."""
        return {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}

    def size(self, width: int, height: int, *, images: int = 1) -> tuple[int, int]:
        """(width, height) after the resize, for one of `images` pictures that share max_pixels.

        facts/bagel.md section 3 (data/transforms.py:MaxLongEdgeMinShortEdgeResize): rounds twice, to even, and
        shrinks by the ratio of pixels where its root is meant; both kept, since the models were trained with them.
        """
        scale = max(min(self.longest / max(width, height), 1.0), self.shortest / min(width, height))
        w, h = self._scaled(width, height, scale)
        if w * h > self.max_pixels / images:
            w, h = self._scaled(w, h, self.max_pixels / images / (w * h))
        if max(w, h) > self.longest:
            w, h = self._scaled(w, h, self.longest / max(w, h))
        return w, h

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        w, h = (max(self.stride, self.stride * round(round(side * scale) / self.stride)) for side in (width, height))
        return w, h

    def __call__(self, image: Image.Image, *, images: int = 1) -> Image.Image:
        """The resized picture (PIL's bicubic, with its antialias)."""
        return image.resize(self.size(image.width, image.height, images=images), Image.Resampling.BICUBIC)


@dataclass(frozen=True, kw_only=True)
class PadSquare:
    """Janus's look at a picture: the long side to `size`, the short one padded, values normalised."""

    size: int
    min_size: int = 14
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    scale: float = 1 / 255

    FILES: ClassVar = {
        "size": "image_size",
        "min_size": "min_size",
        "mean": "image_mean",
        "std": "image_std",
        "scale": "rescale_factor",
    }

    def __post_init__(self) -> None:
        if min(self.size, self.min_size) < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"got {self}: expected positive sizes, and three means and deviations (above 0); "
                "correct preprocessor_config.json"
            )

    @classmethod
    def from_files(cls, files: Mapping[str, Any], *, size: int) -> "PadSquare":
        """Read a preprocessor_config.json; `size`, that of the vision tower, where it names none.

        background_color is not read: the original, too, computes it from the mean.
        """
        if not files.get("do_normalize", True):
            raise ValueError("got do_normalize false in preprocessor_config.json: expected true, as in every release")
        fields: dict[str, Any] = {"size": size}
        fields |= {ours: files[theirs] for ours, theirs in cls.FILES.items() if files.get(theirs) is not None}
        fields |= {name: tuple(fields[name]) for name in ("mean", "std") if name in fields}
        return cls(**fields)

    def to_files(self) -> dict[str, Any]:
        """The mapping that `from_files` reads."""
        files = {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        files |= {"image_mean": list(self.mean), "image_std": list(self.std), "background_color": list(self.fill)}
        return files | {"do_normalize": True, "image_processor_type": "VLMImageProcessor", "processor_class": "VLChatProcessor"}

    @property
    def fill(self) -> tuple[int, ...]:
        """The colour of the padding: the mean, in whole levels."""
        return tuple(int(255 * mean) for mean in self.mean)

    def __call__(self, image: Image.Image) -> Image.Image:
        """An RGB picture as a square. facts/janus.md section 5: sides are cut to whole pixels, in this order of operations."""
        longest = max(image.size)
        width, height = (max(int(side / longest * self.size), self.min_size) for side in image.size)
        side = max(width, height)
        square = Image.new("RGB", (side, side), self.fill)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        square.paste(resized, ((side - width) // 2, (side - height) // 2))
        return square

    def pixels(self, image: Image.Image) -> Tensor:
        """An RGB picture, squared, as normalised values [3, size, size] float32."""
        return normalised(self(image), mean=self.mean, std=self.std, scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """SigLIP's look at a picture: both sides to `size`, whatever their ratio, values normalised.

    resample: PIL's number of a filter; 2, bilinear, is that of SigLIP2's releases.
    """

    size: int
    resample: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    scale: float = 1 / 255

    FILES: ClassVar = {"resample": "resample", "mean": "image_mean", "std": "image_std", "scale": "rescale_factor"}

    def __post_init__(self) -> None:
        if self.size < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"got {self}: expected a positive size, and three means and deviations (above 0); "
                "correct preprocessor_config.json"
            )
        if self.resample not in list(Image.Resampling):
            raise ValueError(f"got resample {self.resample}: expected one of PIL's, 0 to 5; correct preprocessor_config.json")

    @classmethod
    def from_files(cls, files: Mapping[str, Any], *, size: int) -> "Stretch":
        """Read a preprocessor_config.json; the released numbers for what is missing. size: that of the encoder."""
        asked = files.get("size") or {}
        sides = {asked.get("height", size), asked.get("width", size)} if isinstance(asked, Mapping) else {asked}
        switched = [name for name in ("do_resize", "do_rescale", "do_normalize") if files.get(name) is False]
        if sides != {size} or switched:
            raise ValueError(
                f"got size {asked}, {', '.join(switched) or 'nothing'} switched off in preprocessor_config.json: expected "
                f"sides of {size}, which the encoder takes, and nothing switched off"
            )
        fields = {ours: files[theirs] for ours, theirs in cls.FILES.items() if files.get(theirs) is not None}
        fields |= {name: tuple(fields[name]) for name in ("mean", "std") if name in fields}
        return cls(size=size, **fields)

    def to_files(self) -> dict[str, Any]:
        """The mapping that `from_files` reads."""
        files = {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        files |= {"image_mean": list(self.mean), "image_std": list(self.std), "image_processor_type": "SiglipImageProcessor"}
        return files | {"size": {"height": self.size, "width": self.size}, "do_normalize": True}

    def __call__(self, image: Image.Image) -> Image.Image:
        """The picture as a square."""
        return image.resize((self.size, self.size), Image.Resampling(self.resample))

    def pixels(self, image: Image.Image) -> Tensor:
        """An RGB picture, stretched, as normalised values [3, size, size] float32."""
        return normalised(self(image), mean=self.mean, std=self.std, scale=self.scale)


@dataclass(frozen=True)
class CropSquare:
    """A picture to be drawn: the short side to `size`, the middle of the long one."""

    size: int

    def __call__(self, image: Image.Image) -> Image.Image:
        """The square (PIL's bicubic)."""
        shortest = min(image.size)
        width, height = (round(side / shortest * self.size) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + self.size, top + self.size))


def normalised(image: Image.Image, *, mean: Sequence[float], std: Sequence[float], scale: float) -> Tensor:
    """A picture's values times `scale`, less the mean, over the deviation: [3, h, w] float32."""
    # the product in float64, the rest in float32, as in the originals
    values = (np.asarray(image).astype(np.float64) * scale).astype(np.float32)
    normal = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(rearrange(normal, "h w c -> c h w").copy())


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as [3, h, w] float32 in [-1, 1]."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def to_image(pixels: Tensor) -> Image.Image:
    """[3, h, w] in [-1, 1] as a picture; values are clamped and cut, not rounded, to 8 bits, as the originals do."""
    values = ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return Image.fromarray(rearrange(values, "c h w -> h w c").cpu().numpy())


def patchify(x: Tensor, patch: int) -> Tensor:
    """[C, h, w] -> [n, p*p*C]: patches in raster order, features ordered (row in patch, column in patch, channel)."""
    return rearrange(x, "c (h p) (w q) -> (h w) (p q c)", p=patch, q=patch)


def unpatchify(x: Tensor, patch: int, height: int) -> Tensor:
    """The inverse: [n, p*p*C] -> [C, h, w], `height` patches high."""
    return rearrange(x, "(h w) (p q c) -> c (h p) (w q)", h=height, p=patch, q=patch)


def places(height: int, width: int, side: int, *, interpolate: bool = False) -> Tensor:
    """Where a grid of height x width patches lies in a table of side x side, [n] in raster order.

    The top-left corner of the table, or (`interpolate`) the whole table's nearest buckets. Raises ValueError for a grid
    that the table cannot hold: the original's row * side + column would run into the next row unseen.
    """
    if not interpolate and max(height, width) > side:
        raise ValueError(f"got {height}x{width} patches: the position table holds at most {side}x{side}; use a smaller image")
    if interpolate:
        edges = torch.arange(1 / side, 1.0, 1 / side)
        row, column = (torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n), edges, right=True) for n in (height, width))
    else:
        row, column = torch.arange(height), torch.arange(width)
    return (row[:, None] * side + column).flatten()
