"""Parts that several families share: norms, feed-forwards, rotary and fixed positions, the embedding of time.

Axes: B batch, N packed tokens, D model, H heads, K head, F hidden.
"""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.kernels import Mask, attention, linear_few_rows, rms_norm, swiglu
from unimm.nn.few_rows import Half, Int8, Pair

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that a released config means by `name`. Raises ValueError for a name that is not known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r} in the config: expected one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


class RMSNorm(nn.Module):
    """x / rms(x), in float32 and back, then times the weight: the order of Qwen2 (and it matters in bfloat16)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(act(gate(x)) * up(x)), without biases unless asked. Shazeer 2020, arXiv 2002.05202, equation 6."""

    def __init__(self, dim: int, hidden: int, act: str = "silu", *, bias: bool = False):
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias=bias), nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        return self.down(swiglu(gate, up) if self.act is F.silu else self.act(gate) * up)


class MLP(nn.Module):
    """fc2(act(fc1(x))), biased: a ViT's feed-forward, and BAGEL's connector."""

    def __init__(self, dim: int, hidden: int, out: int, act: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class EncoderBlock(nn.Module):
    """Pre-norm attention under a mask, then the feed-forward; biases everywhere: SigLIP's block, and that of CLIP's texts."""

    def __init__(self, dim: int, n_heads: int, hidden: int, act: str, eps: float):
        super().__init__()
        self.head_dim = dim // n_heads
        self.attn_norm = nn.LayerNorm(dim, eps)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp_norm = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, hidden, dim, act)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """x [N, D] -> [N, D]."""
        h = self.attn_norm(x)
        q, k, v = (rearrange(p(h), "n (h k) -> n h k", k=self.head_dim) for p in (self.q, self.k, self.v))
        x = x + self.o(rearrange(attention(q, k, v, mask), "n h k -> n (h k)"))
        return x + self.mlp(self.mlp_norm(x))


class PackedLinear(nn.Module):
    """A linear whose weights, which it shares with the one given, stand in a second order for few rows."""

    def __init__(self, linear: nn.Linear, packed: Half | Pair):
        super().__init__()
        self.weight, self.bias, self.packed = linear.weight, linear.bias, packed

    def forward(self, x: Tensor) -> Tensor:
        return linear_few_rows(x, self.weight, self.bias, self.packed)


class Int8Linear(nn.Module):
    """A linear with weights in int8 alone: no gradient, and a ValueError for who would save them."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = Int8(linear.weight, linear.bias)
        self.register_state_dict_pre_hook(_refuse)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x)


def _refuse(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise ValueError(f"{prefix.rstrip('.')} is in int8, which no file holds: save the model that was prepared")


def rope(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Rotary angles as [2, N, K/2] (cos, sin): position * theta^(-2i/K), computed in float32. RoFormer, arXiv 2104.09864."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * theta**-steps
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of x [N, H, K] by `angles` [2, N, K/2]: the half-split pairing of Llama and Qwen."""
    cos, sin = rearrange(angles, "two n k -> two n 1 k")
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def sincos_2d(side: int, dim: int) -> Tensor:
    """A fixed table of positions for a square grid, [side * side, D]: of (row, column) the column comes first.

    concat(E(column), E(row)), E(p) = concat(sin(p w), cos(p w)), w_i = 10000^(-i / (D/4)); in float64, then float32.
    facts/bagel.md section 1.3; trap 3 says why the order looks wrong.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat((angles.sin(), angles.cos()), -1)  # [side, D/2]
    row, column = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return rearrange(torch.cat((column, row), -1), "h w d -> (h w) d").float()


class TimeEmbedding(nn.Module):
    """256 cosines and sines of the raw time in [0, 1] (not times 1000), then Linear, SiLU, Linear."""

    FREQUENCIES = 128

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, times: Tensor) -> Tensor:
        """times [N] float32 -> [N, D]."""
        steps = torch.arange(self.FREQUENCIES, dtype=torch.float32, device=times.device) / self.FREQUENCIES
        angles = times.float()[:, None] * 10000.0**-steps
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1).to(next(self.mlp.parameters()).dtype))
