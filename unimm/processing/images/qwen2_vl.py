"""Qwen2.5-VL's image processor: sides of whole cells within a number of pixels, then patches in the order of the cells.

A cell is a square of merge_size * merge_size patches, which become one token of the language model.

Axes: C channels, T frames of a patch, p patch, m patches a side of a cell; N patches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from unimm.checkpoint.config_io import JsonLayout, PositiveFloat, PositiveInt, read_config, write_config
from unimm.processing.images.io import normalize, resize

PatchGrid = tuple[int, int, int]  # patches of an image in time, down and across
DEFAULT_MAX_PIXELS = 28 * 28 * 1280  # of a preprocessor_config.json that has none
MAX_ASPECT_RATIO = 200  # sides this many times as long as the other are refused, as in the original


@dataclass(frozen=True, kw_only=True)
class Qwen2VLImageProcessor:
    """Resize to multiples of a cell, of about the image's ratio, between min_pixels and max_pixels; normalise."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int  # frames of a patch; a still image is repeated
    min_pixels: PositiveInt = 56 * 56
    max_pixels: PositiveInt = 28 * 28 * 16384
    resample: int = 3  # PIL's number of a filter
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: PositiveFloat = 1 / 255

    def __post_init__(self) -> None:
        sizes = (self.patch_size, self.merge_size, self.temporal_patch_size, self.min_pixels)
        if self.resample not in list(Image.Resampling):
            raise ValueError(
                f"got resample {self.resample}: expected one of PIL's, 0 to 5; correct preprocessor_config.json"
            )
        if (
            min(sizes) < 1
            or self.max_pixels < self.min_pixels
            or not len(self.mean) == len(self.std)
            or min(self.std) <= 0
        ):
            raise ValueError(
                f"got {self}: expected positive sizes, no fewer max_pixels than min_pixels, and a mean and a "
                "deviation (above 0) for each channel; correct preprocessor_config.json"
            )

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], *, patch_size: int, merge_size: int, temporal_patch_size: int
    ) -> "Qwen2VLImageProcessor":
        """Read a preprocessor_config.json. patch_size, merge_size, temporal_patch_size: those of the vision encoder.

        Without a file the released numbers are taken; where a file names no max_pixels, that of transformers, a 13th.
        Raises ValueError where the file contradicts the encoder, and for a step that is switched off.
        """
        layout = replace(LAYOUT, defaults={"max_pixels": DEFAULT_MAX_PIXELS}) if data else LAYOUT
        given = {"patch_size": patch_size, "merge_size": merge_size, "temporal_patch_size": temporal_patch_size}
        return read_config(cls, data, layout, given=given)

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        return write_config(self, LAYOUT)

    @property
    def merged_patch_size(self) -> int:
        """Pixels of a cell, a side."""
        return self.patch_size * self.merge_size

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize. Raises ValueError for an image over `MAX_ASPECT_RATIO` times as long as
        wide."""
        return smart_resize(height, width, self.merged_patch_size, self.min_pixels, self.max_pixels)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The resized image (by PIL, with its antialias)."""
        height, width = self.resized_size(image.height, image.width)
        return resize(image, (width, height), self.resample)

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB image, resized, as normalised values [3, h, w] float32."""
        return normalize(self(image), mean=self.mean, std=self.std, rescale_factor=self.rescale_factor)

    def to_patches(self, frames: Sequence[Image.Image]) -> tuple[Tensor, PatchGrid]:
        """Frames of one size (a still image is one) -> patches [N, C*T*p*p] and their grid; the last frame fills the
        time.

        Cells in raster order, inside a cell its patches in raster order; features ordered (channel, frame, row,
        column).
        """
        values = torch.stack([self.preprocess(frame) for frame in frames])
        missing = -len(values) % self.temporal_patch_size
        values = torch.cat((values, repeat(values[-1], "c h w -> n c h w", n=missing)))
        t = len(values) // self.temporal_patch_size
        h = values.shape[2] // self.patch_size
        w = values.shape[3] // self.patch_size
        order = "(t f) c (h m p) (w k q) -> (t h w m k) (c f p q)"
        p = self.patch_size
        m = self.merge_size
        return rearrange(values, order, f=self.temporal_patch_size, p=p, q=p, m=m, k=m), (t, h, w)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, about the same ratio, between two numbers of pixels.

    To the nearest multiples, halves to even; where that is too much, scaled down and cut; where too little, scaled up
    and filled.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"got an image of {width}x{height}: expected at most {MAX_ASPECT_RATIO} times as long as wide; crop it"
        )
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > max_pixels:
        ratio = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / ratio / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        ratio = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * ratio / factor) * factor for side in (height, width))
    return h, w


LAYOUT = JsonLayout(
    name="preprocessor_config.json and the vision_config",
    source="every release",
    keys={
        # newer files keep the two limits in `size`, and name them, which are numbers of pixels, after edges
        "min_pixels": ("min_pixels", "size.shortest_edge", "size.min_pixels"),
        "max_pixels": ("max_pixels", "size.longest_edge", "size.max_pixels"),
        "resample": "resample",
        "mean": "image_mean",
        "std": "image_std",
        "rescale_factor": "rescale_factor",
    },
    fixed={"do_normalize": True, "do_resize": True, "do_rescale": True},
    unwritten=("do_resize", "do_rescale"),
    derived={"patch_size": "patch_size", "merge_size": "merge_size", "temporal_patch_size": "temporal_patch_size"},
    constants={"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"},
)
