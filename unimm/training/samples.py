"""Sample images of a model in training, in a grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from unimm.data.batching import image_to_uint8
from unimm.data.shapes import example
from unimm.models.base import UnifiedModel

SAMPLED_TASKS = ("draw.one", "draw.count", "draw.relation", "draw.two")


def sample_grid(model: UnifiedModel) -> Image.Image:
    """Images that the model generates from six test prompts of each of four tasks, a task a row."""
    prompts = [example(task, i, seed=1, split="test").prompt for task in SAMPLED_TASKS for i in range(6)]
    return image_grid(model.generate(prompts, seed=0).images, columns=6, padding=2)


def prompt_grid(model: UnifiedModel, prompts: Sequence[str]) -> Image.Image | None:
    """Images that the model generates from prompts, four a row; None without prompts."""
    return image_grid(model.generate(list(prompts), seed=0).images, columns=4, padding=2) if prompts else None


def tensor_grid(image: Tensor, *, columns: int) -> Image.Image:
    """Images [B, 3, h, w] in [-1, 1], row by row, side by side."""
    return image_grid([Image.fromarray(pixels) for pixels in image_to_uint8(image)], columns=columns)


def image_grid(images: Sequence[Image.Image], *, columns: int, padding: int = 0) -> Image.Image:
    """Images of one size, row by row, with so many white pixels around each."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    grid = make_grid(rearrange(pixels, "B h w C -> B C h w"), nrow=columns, padding=padding, pad_value=255)
    return Image.fromarray(rearrange(grid, "C H W -> H W C").numpy())
