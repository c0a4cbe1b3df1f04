"""The image processor of DeepSeek-VL, which Janus and JanusFlow use."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from unimm.checkpoint.config_io import JsonLayout, PositiveFloat, PositiveInt, read_config, write_config
from unimm.processing.images.io import normalize, resize


@dataclass(frozen=True, kw_only=True)
class DeepseekVLImageProcessor:
    """Resize the long side to `size`, pad the short one, normalise the values."""

    size: PositiveInt
    min_size: PositiveInt = 14
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: PositiveFloat = 1 / 255

    def __post_init__(self) -> None:
        if min(self.size, self.min_size) < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"got {self}: expected positive sizes, and three means and deviations (above 0); "
                "correct preprocessor_config.json"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, size: int) -> "DeepseekVLImageProcessor":
        """Read a preprocessor_config.json; `size`, that of the vision encoder, where it names none.

        background_color is not read: the original, too, computes it from the mean.
        """
        return read_config(cls, data, replace(LAYOUT, defaults={"image_size": size}))

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        return write_config(self, LAYOUT) | {"background_color": list(self.background_color)}

    @property
    def background_color(self) -> tuple[int, ...]:
        """The colour of the padding: the mean, in whole levels."""
        return tuple(int(255 * mean) for mean in self.mean)

    def __call__(self, image: Image.Image) -> Image.Image:
        """An RGB image as a square. As released, sides are truncated to whole pixels, in this order of operations."""
        longest = max(image.size)
        width, height = (max(int(side / longest * self.size), self.min_size) for side in image.size)
        side = max(width, height)
        square = Image.new("RGB", (side, side), self.background_color)
        resized = resize(image, (width, height))
        square.paste(resized, ((side - width) // 2, (side - height) // 2))
        return square

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB image, padded to a square, as normalised values [3, size, size] float32."""
        return normalize(self(image), mean=self.mean, std=self.std, rescale_factor=self.rescale_factor)


LAYOUT = JsonLayout(
    name="preprocessor_config.json",
    source="every release",
    keys={
        "size": ("image_size", "size.height"),  # transformers has the second
        "min_size": "min_size",
        "mean": "image_mean",
        "std": "image_std",
        "rescale_factor": "rescale_factor",
    },
    fixed={"do_normalize": True},
    constants={"image_processor_type": "VLMImageProcessor", "processor_class": "VLChatProcessor"},
)
