"""The image processor of SigLIP2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from unimm.processing.images.io import normalize


@dataclass(frozen=True, kw_only=True)
class SiglipImageProcessor:
    """SigLIP's look at a picture: both sides to `size`, whatever their ratio, values normalised.

    resample: PIL's number of a filter; 2, bilinear, is that of SigLIP2's releases.
    """

    size: int
    resample: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255

    FILES: ClassVar = {
        "resample": "resample",
        "mean": "image_mean",
        "std": "image_std",
        "rescale_factor": "rescale_factor",
    }

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
    def from_json(cls, files: Mapping[str, Any], *, size: int) -> "SiglipImageProcessor":
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

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        files = {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        files |= {
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "image_processor_type": "SiglipImageProcessor",
        }
        return files | {"size": {"height": self.size, "width": self.size}, "do_normalize": True}

    def __call__(self, image: Image.Image) -> Image.Image:
        """The picture as a square."""
        return image.resize((self.size, self.size), Image.Resampling(self.resample))

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB picture, stretched, as normalised values [3, size, size] float32."""
        return normalize(self(image), mean=self.mean, std=self.std, rescale_factor=self.rescale_factor)
