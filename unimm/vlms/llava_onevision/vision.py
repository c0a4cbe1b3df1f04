"""LLaVA-OneVision's images as rows of its language model: the whole image, then its tiles put together.

Axes: n rows of an image, T tiles, D model, F features of a tile.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from unimm.processing.images.llava_onevision import LlavaOnevisionImageProcessor, Size


def arrange_tiles(
    features: Tensor, image_newline: Tensor, size: Size, image_processor: LlavaOnevisionImageProcessor
) -> Tensor:
    """Features [T, F, D] of an image of a (height, width), whole and in tiles -> rows [n, D].

    A newline follows each line of the tiles put together, which leave out the padding around the image.
    """
    if len(features) == 1:
        return torch.cat((features[0], image_newline[None]))
    columns = image_processor.select_grid(*size)[1] // image_processor.tile_size
    crop = image_processor.feature_crop(*size)
    lines = rearrange(features[1:], "(r c) (h w) d -> d (r h) (c w)", c=columns, h=image_processor.tile_side)
    lines = lines[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if crop.size != (crop.height, crop.width):
        lines = F.interpolate(lines[None], crop.size, mode="bilinear")[0]
    lines = torch.cat((lines, image_newline[:, None, None].expand(-1, len(lines[0]), 1)), 2)
    return torch.cat((features[0], rearrange(lines, "d h w -> (h w) d")))
