"""LLaVA-OneVision's image processor: an image resized to one tile, and again cut into tiles at about its own size.

Li et al. 2024, arXiv 2408.03326, section 3.2. The numbers are those of transformers' processor, which the released
files name.

Axes: T tiles, S pixels a side of one, C channels; h w sides of an image or of the features of all its tiles.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unimm.checkpoint.config_io import (
    JsonLayout,
    PositiveFloat,
    PositiveInt,
    read_config,
    read_section,
    read_value,
    write_config,
)
from unimm.checkpoint.json_files import drop_nulls
from unimm.processing.images.io import normalize, resize

Size = tuple[int, int]  # (height, width)
SHRINK_THRESHOLD = 1.1  # features that are longer than allowed by more than this, a side, are shrunk


@dataclass(frozen=True, kw_only=True)
class FeatureCrop:
    """The part of the features of all tiles that is image and not padding, and the size that it is resized to."""

    top: int
    left: int
    height: int
    width: int
    size: Size


@dataclass(frozen=True, kw_only=True)
class LlavaOnevisionImageProcessor:
    """The whole image resized to a tile, then the tiles of the grid that keeps most of its pixels."""

    tile_size: int  # of a tile, a side
    tile_side: int  # features of a tile, a side
    grid_pinpoints: tuple[Size, ...]  # sizes in pixels that tiles may make together
    max_tiles: int  # tiles' worth of features; more are shrunk
    resample: int = 3  # PIL's number of a filter: bicubic
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: PositiveFloat = 1 / 255

    def __post_init__(self) -> None:
        bad = [
            grid
            for grid in self.grid_pinpoints
            if min(grid) < 1 or grid[0] % self.tile_size or grid[1] % self.tile_size
        ]
        if self.resample not in list(Image.Resampling):
            raise ValueError(
                f"got resample {self.resample}: expected one of PIL's, 0 to 5; correct preprocessor_config.json"
            )
        normal = len(self.mean) == len(self.std) == 3 and min(self.std) > 0
        if not self.grid_pinpoints or bad or self.max_tiles < 1 or not normal:
            raise ValueError(
                f"got image_grid_pinpoints {bad or list(self.grid_pinpoints)}, anyres_max_{self.max_tiles}, "
                f"mean {self.mean}, std {self.std}: expected sizes of whole tiles of {self.tile_size} pixels, a "
                "positive number of tiles, and three means and deviations (above 0)"
            )

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        *,
        tile_size: int,
        tile_side: int,
        grid_pinpoints: tuple[Size, ...],
        max_tiles: int,
    ) -> "LlavaOnevisionImageProcessor":
        """Read a preprocessor_config.json; the released numbers for what is missing. The rest is the model's own.

        Raises ValueError where the file asks for other sizes than the model.
        """
        names = ("height", "width", "shortest_edge")
        size = drop_nulls(read_section(data, "size", LAYOUT, required=False))
        sides = {read_value(size, name, PositiveInt, tile_size, layout=LAYOUT) for name in names}
        pinpoints = read_value(data, "image_grid_pinpoints", tuple[Size, ...], (), layout=LAYOUT)
        if sides != {tile_size} or (pinpoints and set(pinpoints) != set(grid_pinpoints)):
            raise ValueError(
                f"got size {dict(size)}, image_grid_pinpoints {list(pinpoints)} in preprocessor_config.json: expected "
                f"tiles of {tile_size} pixels and the image_grid_pinpoints of config.json"
            )
        given = {
            "tile_size": tile_size,
            "tile_side": tile_side,
            "grid_pinpoints": grid_pinpoints,
            "max_tiles": max_tiles,
        }
        return read_config(cls, data, LAYOUT, given=given)

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        size = {"height": self.tile_size, "width": self.tile_size}
        pinpoints = [list(grid) for grid in self.grid_pinpoints]
        return write_config(self, LAYOUT) | {"size": size, "image_grid_pinpoints": pinpoints}

    def select_grid(self, height: int, width: int) -> Size:
        """The grid that keeps most of an image's pixels; of several, the one that wastes the fewest."""

        def preference(grid: Size) -> tuple[int, int]:
            scale = min(grid[1] / width, grid[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - grid[0] * grid[1]

        return max(self.grid_pinpoints, key=preference)  # the first of the best, as in the original

    def feature_crop(self, height: int, width: int) -> FeatureCrop:
        """The part of the features that an image of this size fills; the rest is padding."""
        full_h, full_w = (pixels // self.tile_size * self.tile_side for pixels in self.select_grid(height, width))
        top = left = 0
        if width / height > full_w / full_h:
            top = (full_h - int(round(height * (full_w / width), 7))) // 2
        else:
            left = (full_w - int(round(width * (full_h / height), 7))) // 2
        h = full_h - 2 * top
        w = full_w - 2 * left
        ratio = math.sqrt(h * w / (self.max_tiles * self.tile_side**2))
        size = (int(h // ratio), int(w // ratio)) if ratio > SHRINK_THRESHOLD else (h, w)
        return FeatureCrop(top=top, left=left, height=h, width=w, size=size)

    def n_image_tokens(self, height: int, width: int, *, tiled: bool) -> int:
        """Image tokens of an image of this size: the whole, then lines of tiles with a newline behind each."""
        if not tiled:
            return self.tile_side**2 + 1
        h, w = self.feature_crop(height, width).size
        return self.tile_side**2 + h * (w + 1)

    def preprocess(self, image: Image.Image, *, tiled: bool) -> Tensor:
        """An RGB image -> [T, C, S, S] float32, normalised: the whole of it, then its tiles in raster order.

        Not `tiled`: the whole alone, padded to a square.
        """
        if not tiled:
            return self._normalize_tile(self._pad_to_square(image))[None]
        grid = self.select_grid(image.height, image.width)
        padded = self._resize_and_pad(image, grid)
        s = self.tile_size
        corners = [(x, y) for y in range(0, grid[0], s) for x in range(0, grid[1], s)]
        cut = [padded.crop((x, y, x + s, y + s)) for x, y in corners]
        return torch.stack([self._normalize_tile(part) for part in (image, *cut)])

    def _resize_and_pad(self, image: Image.Image, grid: Size) -> Image.Image:
        """The image as large as fits a grid, in the middle, on black."""
        down = grid[0] / image.height
        across = grid[1] / image.width
        if across < down:
            height = min(math.ceil(image.height * across), grid[0])
            width = grid[1]
        else:
            height = grid[0]
            width = min(math.ceil(image.width * down), grid[1])
        padded = Image.new("RGB", (grid[1], grid[0]))
        resized = resize(image, (width, height), self.resample)
        padded.paste(resized, ((grid[1] - width) // 2, (grid[0] - height) // 2))
        return padded

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        """The image on a square of the mean's colour."""
        longest = max(image.size)
        square = Image.new("RGB", (longest, longest), tuple(int(255 * mean) for mean in self.mean))
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        return square

    def _normalize_tile(self, image: Image.Image) -> Tensor:
        whole = resize(image, (self.tile_size, self.tile_size), self.resample)
        return normalize(whole, mean=self.mean, std=self.std, rescale_factor=self.rescale_factor)


LAYOUT = JsonLayout(
    name="preprocessor_config.json",
    source="every release",
    keys={"resample": "resample", "mean": "image_mean", "std": "image_std", "rescale_factor": "rescale_factor"},
    fixed={"do_normalize": True, "do_resize": True, "do_rescale": True},
    unwritten=("do_resize", "do_rescale"),
    constants={
        "do_pad": True,
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
    },
)
