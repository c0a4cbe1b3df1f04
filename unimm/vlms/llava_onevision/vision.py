"""LLaVA-OneVision's pictures as rows of its language model: whole, then tile by tile.

Axes: n rows of a picture, T tiles, D model, F features of a tile.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from unimm.processing.images.llava_onevision import LlavaOnevisionImageProcessor, Size


def arrange_tiles(
    features: Tensor, image_newline: Tensor, size: Size, image_processor: LlavaOnevisionImageProcessor
) -> Tensor:
    """Features [T, F, D] of a picture of a size: whole and its tiles -> rows [n, D], a newline behind each line.

    The lines are those of the tiles put together, without the padding around the picture.
    """
    if len(features) == 1:
        return torch.cat((features[0], image_newline[None]))
    across, frame = (
        image_processor.select_grid(*size)[1] // image_processor.tile_size,
        image_processor.feature_crop(*size),
    )
    lines = rearrange(features[1:], "(r c) (h w) d -> d (r h) (c w)", c=across, h=image_processor.tile_side)
    lines = lines[:, frame.top : frame.top + frame.height, frame.left : frame.left + frame.width]
    if frame.size != (frame.height, frame.width):
        lines = F.interpolate(lines[None], frame.size, mode="bilinear")[0]
    lines = torch.cat((lines, image_newline[:, None, None].expand(-1, len(lines[0]), 1)), 2)
    return torch.cat((features[0], rearrange(lines, "d h w -> (h w) d")))
