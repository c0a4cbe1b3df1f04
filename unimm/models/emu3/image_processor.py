"""Emu3's images: sides in multiples of a code's, within a number of pixels, then values in [-1, 1].

docs/originals/emu3.md, "Images".
"""

from dataclasses import dataclass
from typing import ClassVar

from PIL import Image
from torch import Tensor

from unimm.checkpoint.config_io import JsonConfig, JsonLayout, PositiveFloat, PositiveInt
from unimm.processing.images.io import normalize, resize
from unimm.processing.images.qwen2_vl import smart_resize

MAX_ASPECT_RATIO = 5


@dataclass(frozen=True, kw_only=True)
class Emu3ImageProcessor(JsonConfig):
    """Resize to multiples of `stride` pixels, of about the image's ratio, between two numbers of pixels; normalise."""

    stride: PositiveInt = 8
    min_pixels: PositiveInt = 512 * 512
    max_pixels: PositiveInt = 1024 * 1024
    resample: int = 3  # PIL's number of a filter
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: PositiveFloat = 1 / 255

    JSON: ClassVar = JsonLayout(
        name="preprocessor_config.json",
        source="BAAI/Emu3-VisionTokenizer",
        keys={
            "stride": "spatial_factor",
            "min_pixels": ("min_pixels", "size.min_pixels"),
            "max_pixels": ("max_pixels", "size.max_pixels"),
            "resample": "resample",
            "mean": "image_mean",
            "std": "image_std",
            "rescale_factor": "rescale_factor",
        },
        fixed={"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True},
        constants={"image_processor_type": "Emu3VisionVQImageProcessor"},
    )

    def __post_init__(self) -> None:
        if self.resample not in list(Image.Resampling):
            raise ValueError(
                f"got resample {self.resample}: expected one of PIL's, 0 to 5; correct preprocessor_config.json"
            )
        if self.max_pixels < self.min_pixels or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"got {self}: expected no fewer max_pixels than min_pixels, and a mean and a deviation (above 0) for "
                "each of 3 channels; correct preprocessor_config.json"
            )

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize. Raises ValueError for an image that is too small, or too long."""
        if min(height, width) < self.stride:
            raise ValueError(
                f"got an image of {width}x{height}: expected at least {self.stride} pixels a side; enlarge it"
            )
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"got an image of {width}x{height}: expected at most {MAX_ASPECT_RATIO} times as long as wide; crop it"
            )
        return smart_resize(height, width, self.stride, self.min_pixels, self.max_pixels)

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB image, resized, as normalised values [3, h, w] float32."""
        height, width = self.resized_size(image.height, image.width)
        resized = resize(image, (width, height), self.resample)
        return normalize(resized, mean=self.mean, std=self.std, rescale_factor=self.rescale_factor)
