"""Samples to look at while a model trains."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from unimm.data.shapes import example
from unimm.models.base import UnifiedModel


def sample_grid(model: UnifiedModel) -> Image.Image:
    """Test prompts drawn: four rows of six."""
    tasks = ("draw.one", "draw.count", "draw.relation", "draw.two")
    prompts = [example(task, i, seed=1, split="test").prompt for task in tasks for i in range(6)]
    return image_grid(model.generate(prompts, seed=0).images, columns=6)


def image_grid(images: Sequence[Image.Image], *, columns: int, gap: int = 2) -> Image.Image:
    """Pictures of one size on one sheet."""
    w, h = images[0].size
    sheet = Image.new("RGB", (columns * (w + gap) - gap, -(-len(images) // columns) * (h + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (w + gap), i // columns * (h + gap)))
    return sheet
