"""Images to patches and back."""

from einops import rearrange
from torch import Tensor


def patchify(x: Tensor, patch: int) -> Tensor:
    """[C, h, w] -> [n, p*p*C]: patches in raster order, features ordered (row in patch, column in patch, channel)."""
    return rearrange(x, "c (h p) (w q) -> (h w) (p q c)", p=patch, q=patch)


def unpatchify(x: Tensor, patch: int, height: int) -> Tensor:
    """The inverse: [n, p*p*C] -> [C, h, w], `height` patches high."""
    return rearrange(x, "(h w) (p q c) -> c (h p) (w q)", h=height, p=patch, q=patch)
