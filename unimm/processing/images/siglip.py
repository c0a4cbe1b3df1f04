"""The image processor of SigLIP2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from unimm.checkpoint.config_io import JsonLayout, PositiveFloat, PositiveInt, read_config, write_config
from unimm.checkpoint.json_files import at_place_of
from unimm.processing.images.io import normalize, resize


@dataclass(frozen=True, kw_only=True)
class SiglipImageProcessor:
    """Resize both sides to `size`, whatever their ratio; normalise the values.

    resample: PIL's number of a filter; 2, bilinear, is that of SigLIP2's releases.
    """

    size: PositiveInt
    resample: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: PositiveFloat = 1 / 255

    def __post_init__(self) -> None:
        if self.size < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"got {self}: expected a positive size, and three means and deviations (above 0); "
                "correct preprocessor_config.json"
            )
        if self.resample not in list(Image.Resampling):
            raise ValueError(
                f"got resample {self.resample}: expected one of PIL's, 0 to 5; correct preprocessor_config.json"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, size: int) -> "SiglipImageProcessor":
        """Read a preprocessor_config.json; the released numbers for what is missing. size: that of the encoder.

        Raises ValueError for another size, and for a step that is switched off.
        """
        if isinstance(data.get("size"), int):
            data = at_place_of(data, {**data, "size": {"height": data["size"], "width": data["size"]}})
        return read_config(cls, data, LAYOUT, given={"size": size})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        return write_config(self, LAYOUT)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image as a square."""
        return resize(image, (self.size, self.size), self.resample)

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB image, resized, as normalised values [3, size, size] float32."""
        return normalize(self(image), mean=self.mean, std=self.std, rescale_factor=self.rescale_factor)


LAYOUT = JsonLayout(
    name="preprocessor_config.json and the encoder's size",
    source="every release",
    keys={"resample": "resample", "mean": "image_mean", "std": "image_std", "rescale_factor": "rescale_factor"},
    fixed={"do_normalize": True, "do_resize": True, "do_rescale": True},
    unwritten=("do_resize", "do_rescale"),
    derived={"size.height": "size", "size.width": "size"},
    constants={"image_processor_type": "SiglipImageProcessor"},
)
