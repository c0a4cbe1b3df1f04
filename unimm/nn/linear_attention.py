"""Attention whose cost is linear in the number of tokens, and the feed-forward that goes with it: of DC-AE and of Sana.

Axes: B batch, C channels, h w grid, H heads, L tokens, K head.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.kernels import swiglu

MIN_DENOMINATOR = 1e-15  # keeps a row whose scores are all 0 from 0 / 0


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """relu(q) relu(k)^T v, each row over the sum of its scores: q, k, v [..., L, K] -> [..., L, K] float32.

    The products are taken from the right, so the cost grows with L and not with its square: EfficientViT, arXiv
    2205.14756, section 3.1.
    """
    q = F.relu(q).float()
    k = F.relu(k).float()
    v = v.float()
    return q @ (k.mT @ v) / (q @ k.sum(-2)[..., None] + MIN_DENOMINATOR)


def channels_last(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h, w, C]"""
    return rearrange(x, "B C h w -> B h w C")


def channels_first(x: Tensor) -> Tensor:
    """[B, h, w, C] -> [B, C, h, w]"""
    return rearrange(x, "B h w C -> B C h w")


class MixFFN(nn.Module):
    """1x1 convolution, SiLU, depthwise 3x3 convolution, half of the channels gated by the other, 1x1 convolution."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.conv_inverted = nn.Conv2d(dim, 2 * hidden_dim, 1)
        self.conv_depth = nn.Conv2d(2 * hidden_dim, 2 * hidden_dim, 3, padding=1, groups=2 * hidden_dim)
        self.conv_point = nn.Conv2d(hidden_dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> the same; the 1x1 convolutions are products of matrices in this layout."""
        y = F.silu(F.linear(x, self.conv_inverted.weight.flatten(1), self.conv_inverted.bias))
        y, gate = channels_last(self.conv_depth(channels_first(y))).chunk(2, -1)
        return F.linear(swiglu(gate, y), self.conv_point.weight.flatten(1))
