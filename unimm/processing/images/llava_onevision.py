"""LLaVA-OneVision's look at a picture: whole, and again in tiles at about its own size; rows for what the tiles show.

Li et al. 2024, arXiv 2408.03326, section 3.2. The numbers are those of transformers' processor, which the released files name.

Axes: T tiles, S pixels a side of one, C channels; h w sides of a picture or of the features of all its tiles; n rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from unimm.processing.images.io import normalised

Size = tuple[int, int]  # (height, width)
SHRINK = 1.1  # features that are longer than allowed by more than this, a side, are shrunk


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Which part of the features of all tiles shows the picture, and the size that it is brought to."""

    top: int
    left: int
    height: int
    width: int
    size: Size


@dataclass(frozen=True, kw_only=True)
class AnyRes:
    """The whole picture stretched to a tile, then the tiles of the grid that keeps most of it."""

    size: int  # of a tile, a side
    side: int  # features of a tile, a side
    grids: tuple[Size, ...]  # sizes in pixels that tiles may make together
    most: int  # tiles' worth of features; more are shrunk
    resample: int = 3  # PIL's number of a filter: bicubic
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    scale: float = 1 / 255

    FILES: ClassVar = {"resample": "resample", "mean": "image_mean", "std": "image_std", "scale": "rescale_factor"}

    def __post_init__(self) -> None:
        bad = [grid for grid in self.grids if min(grid) < 1 or grid[0] % self.size or grid[1] % self.size]
        if not self.grids or bad or self.most < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"got image_grid_pinpoints {bad or list(self.grids)}, anyres_max_{self.most}, mean {self.mean}, std {self.std}"
                f": expected sizes of whole tiles of {self.size} pixels, a positive number of tiles, and three means and "
                "deviations (above 0)"
            )

    @classmethod
    def from_files(
        cls, files: Mapping[str, Any], *, size: int, side: int, grids: tuple[Size, ...], most: int
    ) -> "AnyRes":
        """Read a preprocessor_config.json; the released numbers for what is missing. The rest is the model's own.

        Raises ValueError where the file asks for other sizes than the model.
        """
        asked = files.get("size") or {}
        sides = {asked.get(name, size) for name in ("height", "width", "shortest_edge")}
        pinned = files.get("image_grid_pinpoints")
        switched = [name for name in ("do_resize", "do_rescale", "do_normalize") if files.get(name) is False]
        if sides != {size} or switched or (pinned is not None and {tuple(grid) for grid in pinned} != set(grids)):
            raise ValueError(
                f"got size {asked}, {', '.join(switched) or 'nothing'} switched off, grids {pinned} in "
                f"preprocessor_config.json: expected tiles of {size} pixels and the image_grid_pinpoints of config.json"
            )
        fields = {ours: files[theirs] for ours, theirs in cls.FILES.items() if files.get(theirs) is not None}
        fields |= {name: tuple(fields[name]) for name in ("mean", "std") if name in fields}
        return cls(size=size, side=side, grids=grids, most=most, **fields)

    def to_files(self) -> dict[str, Any]:
        """The mapping that `from_files` reads."""
        files = {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        files |= {"image_mean": list(self.mean), "image_std": list(self.std), "do_normalize": True, "do_pad": True}
        files |= {
            "size": {"height": self.size, "width": self.size},
            "image_grid_pinpoints": [list(g) for g in self.grids],
        }
        return files | {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
        }

    def grid(self, height: int, width: int) -> Size:
        """Of all grids the one that keeps most of a picture's pixels; of several the one that wastes the fewest."""

        def merit(grid: Size) -> tuple[int, int]:
            scale = min(grid[1] / width, grid[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - grid[0] * grid[1]

        return max(self.grids, key=merit)  # the first of the best, as in the original

    def frame(self, height: int, width: int) -> Frame:
        """The part of the features that a picture of this size fills; the rest shows the padding around it."""
        full_h, full_w = (pixels // self.size * self.side for pixels in self.grid(height, width))
        top = left = 0
        if width / height > full_w / full_h:
            top = (full_h - int(round(height * (full_w / width), 7))) // 2
        else:
            left = (full_w - int(round(width * (full_h / height), 7))) // 2
        h, w = full_h - 2 * top, full_w - 2 * left
        ratio = math.sqrt(h * w / (self.most * self.side**2))
        size = (int(h // ratio), int(w // ratio)) if ratio > SHRINK else (h, w)
        return Frame(top=top, left=left, height=h, width=w, size=size)

    def rows(self, height: int, width: int, *, tiled: bool) -> int:
        """Rows of a picture of this size: the whole, then lines of tiles with a newline behind each."""
        if not tiled:
            return self.side**2 + 1
        h, w = self.frame(height, width).size
        return self.side**2 + h * (w + 1)

    def tiles(self, image: Image.Image, *, tiled: bool) -> Tensor:
        """An RGB picture -> [T, C, S, S] float32, normalised: the whole of it, then its tiles in raster order.

        Not `tiled`: the whole alone, padded to a square.
        """
        if not tiled:
            return self._pixels(self._square(image))[None]
        grid = self.grid(image.height, image.width)
        canvas, s = self._padded(image, grid), self.size
        corners = [(x, y) for y in range(0, grid[0], s) for x in range(0, grid[1], s)]
        cut = [canvas.crop((x, y, x + s, y + s)) for x, y in corners]
        return torch.stack([self._pixels(part) for part in (image, *cut)])

    def _padded(self, image: Image.Image, grid: Size) -> Image.Image:
        """The picture as large as it fits a grid, in the middle, on black."""
        down, across = grid[0] / image.height, grid[1] / image.width
        if across < down:
            height, width = min(math.ceil(image.height * across), grid[0]), grid[1]
        else:
            height, width = grid[0], min(math.ceil(image.width * down), grid[1])
        canvas = Image.new("RGB", (grid[1], grid[0]))
        resized = image.resize((width, height), Image.Resampling(self.resample))
        canvas.paste(resized, ((grid[1] - width) // 2, (grid[0] - height) // 2))
        return canvas

    def _square(self, image: Image.Image) -> Image.Image:
        """The picture on a square of the mean's colour."""
        longest = max(image.size)
        square = Image.new("RGB", (longest, longest), tuple(int(255 * mean) for mean in self.mean))
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        return square

    def _pixels(self, image: Image.Image) -> Tensor:
        whole = image.resize((self.size, self.size), Image.Resampling(self.resample))
        return normalised(whole, mean=self.mean, std=self.std, scale=self.scale)
