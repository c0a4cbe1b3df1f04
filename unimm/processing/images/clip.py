"""The image processor of CLIP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from unimm.checkpoint.config_io import JsonLayout, PositiveFloat, PositiveInt, read_config, write_config
from unimm.checkpoint.json_files import at_place_of
from unimm.processing.images.io import MAX_PIXELS, normalize, resize


@dataclass(frozen=True, kw_only=True)
class CLIPImageProcessor:
    """Resize the short side to `size`, cut the middle square out, normalise the values."""

    size: PositiveInt
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: PositiveFloat = 1 / 255

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"got {self}: expected three means and deviations (above 0); correct preprocessor_config.json"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, size: int) -> "CLIPImageProcessor":
        """Read a preprocessor_config.json; the released numbers for what is missing. size: that of the encoder.

        Raises ValueError for another size, and for a step that is switched off or that no release has.
        """
        # as older files have them
        sizes: dict[str, Any] = {}
        if isinstance(data.get("size"), int):
            sizes["size"] = {"shortest_edge": data["size"]}
        if isinstance(data.get("crop_size"), int):
            sizes["crop_size"] = {"height": data["crop_size"], "width": data["crop_size"]}
        return read_config(cls, at_place_of(data, {**data, **sizes}), LAYOUT, given={"size": size})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        return write_config(self, LAYOUT)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The middle of an image as a square."""
        resized = resize_short_side(image, self.size)
        left = (resized.width - self.size) // 2
        top = (resized.height - self.size) // 2
        return resized.crop((left, top, left + self.size, top + self.size))

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB image, resized and cropped, as normalised values [3, size, size] float32."""
        return normalize(self(image), mean=self.mean, std=self.std, rescale_factor=self.rescale_factor)


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """An image (PIL's bicubic) whose short side is `size`, the long one truncated to whole pixels.

    Raises ValueError for one so long that the result would have more than MAX_PIXELS.
    """
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"got an image of {image.width}x{image.height}: resized to a short side of {size} it has "
            f"{width * height:,} pixels, expected at most {MAX_PIXELS:,}; cut it nearer to a square"
        )
    return resize(image, (width, height))


LAYOUT = JsonLayout(
    name="preprocessor_config.json and the encoder's size",
    source="openai/clip-vit-large-patch14-336",
    keys={"mean": "image_mean", "std": "image_std", "rescale_factor": "rescale_factor"},
    fixed={"do_normalize": True, "do_resize": True, "do_rescale": True, "do_center_crop": True, "resample": 3},
    derived={"size.shortest_edge": "size", "crop_size.height": "size", "crop_size.width": "size"},
    constants={"image_processor_type": "CLIPImageProcessor"},
)
