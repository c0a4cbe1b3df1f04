"""Crops of the images of records, for parts that are trained on images alone: autoencoders and image tokenizers."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unimm.data.batching import stack_images
from unimm.data.mix import DataMix
from unimm.data.records import BrokenRow, Record
from unimm.training.config import TrainConfig
from unimm.training.fields import AtLeastOne, Fraction, Positive, RecipeSection
from unimm.training.record_batches import open_groups

# draws of a mix for each image that is asked for
DRAWS_PER_IMAGE = 100


@dataclass(frozen=True, kw_only=True)
class ImageCropConfig(RecipeSection):
    """How images become crops: part of the recipe's `options`."""

    # of a crop's sides, in pixels
    image_size: AtLeastOne
    # before a crop is taken at random, an image's short side is resized to image_size times a number between these, at random
    zoom: tuple[Positive, Positive]
    # the part of images that are mirrored
    mirrored: Fraction = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"got zoom {list(self.zoom)}: expected two numbers of 1 or more, the smaller one first")


@dataclass(frozen=True, kw_only=True)
class ImageSample:
    """A crop, uint8 [h, w, 3]. n_tokens: its cells in the latent grid."""

    image: NDArray[np.uint8]
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class ImageSampleBuilder(ABC):
    """Crops of records' images, and batches of them. stride: pixels of a cell of the latent grid, a side."""

    crop: ImageCropConfig
    stride: int

    def __post_init__(self) -> None:
        if self.crop.image_size % self.stride:
            raise ValueError(
                f"got image_size {self.crop.image_size} in options, expected a multiple of {self.stride}, the model's stride"
            )

    @property
    def grid(self) -> int:
        """Cells of the latent grid, a side."""
        return self.crop.image_size // self.stride

    @abstractmethod
    def collate(self, samples: Sequence[ImageSample], rng: random.Random) -> Any:
        """Crops as a batch, with the noise that it needs."""

    def prepare(self, record: Record, rng: random.Random) -> ImageSample:
        """A crop of one of a record's images at random, whatever they are for.

        Raises ValueError for a record without images, and for one that is missing or broken.
        """
        if not record.images:
            raise ValueError("got a record without an image: expected one or more")
        image = random_crop(rng.choice(record.images).load(), self.crop, rng)
        return ImageSample(image=np.asarray(image), n_tokens=self.grid**2)

    def images(self, samples: Sequence[ImageSample]) -> Tensor:
        """Crops as images [B, 3, h, w] in [-1, 1]."""
        return stack_images([sample.image for sample in samples])


def random_crop(image: Image.Image, crop: ImageCropConfig, rng: random.Random) -> Image.Image:
    """A square of an image, resized (PIL's bicubic) and mirrored at random."""
    short = min(image.size)
    side = round(crop.image_size * rng.uniform(*crop.zoom))
    width, height = (max(crop.image_size, round(one * side / short)) for one in image.size)
    left = rng.randint(0, width - crop.image_size)
    top = rng.randint(0, height - crop.image_size)
    # of the image's own pixels the box that becomes the crop: what is cut off is not resized
    x = image.width / width
    y = image.height / height
    box = (left * x, top * y, (left + crop.image_size) * x, (top + crop.image_size) * y)
    resized = image.resize((crop.image_size, crop.image_size), Image.Resampling.BICUBIC, box=box)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < crop.mirrored else resized


def data_images(builder: ImageSampleBuilder, recipe: TrainConfig, n: int, *, together: int = 64) -> Iterator[Tensor]:
    """Yield n crops of a recipe's data, at random, [B, 3, h, w] in [-1, 1] each, of at most so many.

    Raises ValueError where almost every row is broken.
    """
    assert recipe.data is not None, "the recipe has data"
    stream = DataMix(open_groups(recipe.data), builder.prepare, seed=recipe.seed).stream()
    samples: list[ImageSample] = []
    found = 0
    for _ in range(DRAWS_PER_IMAGE * n):
        item = stream.draw(stream.choose()).item
        if isinstance(item, BrokenRow):
            continue
        samples.append(item)
        found += 1
        if len(samples) == together or found == n:
            yield builder.images(samples)
            samples = []
        if found == n:
            return
    raise ValueError(f"got {found} images of {DRAWS_PER_IMAGE * n} rows of the data, expected {n}: the rest is broken")


def reconstruction_rows(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Images [B, 3, h, w], and their reconstructions behind them."""
    return rearrange([image.cpu(), reconstruction.float().cpu()], "n B C h w -> (n B) C h w")


def latent_noise(n: int, shape: tuple[int, int, int], rng: random.Random) -> Tensor:
    """Noise [n, C, h, w] of the normal distribution."""
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    return torch.randn(n, *shape, generator=generator)
