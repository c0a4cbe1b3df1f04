"""Layers that several families share: activations, norms, feed-forwards, and a ViT's block.

Axes: N packed tokens, D model, H heads, K head.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.kernels import AttentionMask, attention, rms_norm, swiglu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


Activation = Annotated[str, tuple(ACTIVATIONS)]


def get_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name in released configs. Raises ValueError for an unknown name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r} in the config: expected one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


class RMSNorm(nn.Module):
    """x / rms(x), in float32 and cast back, then times the weight: the order of Qwen2, which matters in bfloat16."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(act(gate(x)) * up(x)), without biases by default. Shazeer 2020, arXiv 2002.05202, equation 6."""

    def __init__(self, dim: int, hidden_dim: int, act: str = "silu", *, bias: bool = False):
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=bias)
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)
        self.act = get_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        up = self.up(x)
        return self.down(swiglu(gate, up) if self.act is F.silu else self.act(gate) * up)


class MLP(nn.Module):
    """fc2(act(fc1(x))), biased: a ViT's feed-forward, and BAGEL's connector."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int, act: str):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)
        self.act = get_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class EncoderBlock(nn.Module):
    """Pre-norm attention under a mask, then the feed-forward, with biases: the block of SigLIP and of CLIP's text
    encoder."""

    def __init__(self, dim: int, n_heads: int, mlp_dim: int, act: str, eps: float):
        super().__init__()
        self.head_dim = dim // n_heads
        self.attn_norm = nn.LayerNorm(dim, eps)
        self.q, self.k, self.v, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp_norm = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, mlp_dim, dim, act)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """x [N, D] -> [N, D]."""
        h = self.attn_norm(x)
        q, k, v = (rearrange(p(h), "n (h k) -> n h k", k=self.head_dim) for p in (self.q, self.k, self.v))
        x = x + self.out_proj(rearrange(attention(q, k, v, mask), "n h k -> n (h k)"))
        return x + self.mlp(self.mlp_norm(x))
