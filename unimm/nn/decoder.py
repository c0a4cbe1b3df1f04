"""The transformer decoder of every family: streams that project apart and attend together.

One stream is a Llama or Qwen2 block. Two are BAGEL's Mixture-of-Transformers (arXiv 2505.14683, section 2.1): each
token belongs to one expert, whose weights alone it meets, and all tokens attend together.

Axes: N packed tokens, n tokens of one stream, D model, H query heads, G key/value heads, K head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.kernels import qk_norm_rope
from unimm.nn.layers import RMSNorm, SwiGLU
from unimm.nn.rope import apply_rope, rope_cos_sin

RowsByExpert = dict[str, Tensor]  # stream -> its tokens
AttentionFn = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> y


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    act: str
    qkv_bias: bool
    qk_norm: bool
    experts: tuple[str, ...]  # who owns weights in a block
    rope_sections: tuple[int, ...] = ()  # rotary frequencies of each axis, where positions have several
    tie_word_embeddings: bool = False  # the language head is the table of embeddings

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"dim {self.dim} must be a multiple of n_heads {self.n_heads}, and that of n_kv_heads {self.n_kv_heads}"
            )
        if self.rope_sections and sum(self.rope_sections) != self.head_dim // 2:
            raise ValueError(
                f"got rotary sections {self.rope_sections} in the config: expected a sum of {self.head_dim // 2}, half a head"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


class ExpertRouting:
    """Which rows of a pack belong to which stream; from pack order to stream order and back."""

    def __init__(self, rows: RowsByExpert):
        self.rows = {name: at for name, at in rows.items() if len(at)}
        self.sizes = [len(at) for at in self.rows.values()]
        self.packed_order = torch.cat(list(self.rows.values())).argsort()

    def split(self, x: Tensor) -> RowsByExpert:
        """x [N, ...] -> {stream: [n, ...]}."""
        if len(self.rows) == 1:
            return dict.fromkeys(self.rows, x)
        return {name: x.index_select(0, at) for name, at in self.rows.items()}

    def join(self, by_expert: RowsByExpert) -> Tensor:
        """{stream: [n, ...]} -> [N, ...]."""
        if len(by_expert) == 1:
            return next(iter(by_expert.values()))
        return torch.cat([by_expert[name] for name in self.rows]).index_select(0, self.packed_order)


class ExpertWeights(nn.Module):
    """What one kind of token owns in a block: its way into attention and its way out."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.q = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.mlp_dim, config.act)

    def project_qkv(self, x: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, D], angles [2, n, K/2] -> q [n, H, K], k and v [n, G, K], q and k normed and turned."""
        h = self.attn_norm(x)
        q, k, v = (rearrange(p(h), "n (h k) -> n h k", k=self.head_dim) for p in (self.q, self.k, self.v))
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            q, k = qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, cos_sin, self.q_norm.eps)
        else:
            q, k = apply_rope(q, cos_sin), apply_rope(k, cos_sin)
        # under autocast the angles are float32; the released code, too, casts back here
        return q.to(v.dtype), k.to(v.dtype), v

    def output_and_mlp(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream x [n, D] and attention's output y [n, H, K] -> [n, D]."""
        x = x + self.out_proj(rearrange(y, "n h k -> n (h k)"))
        return x + self.mlp(self.mlp_norm(x))


class DecoderBlock(nn.Module):
    """Streams project apart and attend together; with one stream, a plain decoder block."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.experts = nn.ModuleDict({name: ExpertWeights(config) for name in config.experts})

    def forward(
        self, x: RowsByExpert, cos_sin: RowsByExpert, routing: ExpertRouting, attend: AttentionFn
    ) -> RowsByExpert:
        """x {stream: [n, D]}, angles {stream: [2, n, K/2]} -> {stream: [n, D]}."""
        experts: dict[str, ExpertWeights] = {name: self.experts.get_submodule(name) for name in x}  # type: ignore[misc]
        projected = {name: experts[name].project_qkv(part, cos_sin[name]) for name, part in x.items()}
        q, k, v = (routing.join({name: qkv[i] for name, qkv in projected.items()}) for i in range(3))
        y = routing.split(attend(self.layer, q, k, v))
        return {name: experts[name].output_and_mlp(part, y[name]) for name, part in x.items()}


class TiedHead(nn.Module):
    """A language head whose weight is the table of embeddings; it holds no parameter of its own."""

    def __init__(self, embed: nn.Embedding):
        super().__init__()
        self.embedding = (embed,)  # no part of this module: its weight would have two names

    @property
    def weight(self) -> Tensor:
        """[V, D]."""
        return self.embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def mrope_cos_sin(positions: Tensor, config: DecoderConfig, dtype: torch.dtype) -> Tensor:
    """Rotary angles [2, N, K/2] of positions [N]; or of [N, A], where each axis turns the frequencies of its section.

    M-RoPE, arXiv 2409.12191, section 2.1: with equal axes it is the rotation of one.
    """
    if positions.ndim == 1:
        return rope_cos_sin(positions, config.head_dim, config.rope_theta, dtype)
    axes = [
        rope_cos_sin(at, config.head_dim, config.rope_theta, dtype).split(config.rope_sections, -1)
        for at in positions.unbind(1)
    ]
    return torch.cat([parts[i] for i, parts in enumerate(axes)], -1)


class Decoder(nn.Module):
    """Token embedding, blocks, a final norm for each stream, and the language head."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.n_layers))
        self.norms = nn.ModuleDict({name: RMSNorm(config.dim, config.norm_eps) for name in config.experts})
        self.head = (
            TiedHead(self.embed) if config.tie_word_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        )

    def forward(self, x: Tensor, positions: Tensor, rows: RowsByExpert, attend: AttentionFn) -> RowsByExpert:
        """x [N, D], positions [N] or [N, axes], rows {stream: [n]} -> {stream: [n, D]}, before the final norms."""
        routing = ExpertRouting(rows)
        by_expert = routing.split(x)
        cos_sin = {name: mrope_cos_sin(at, self.config, x.dtype) for name, at in routing.split(positions).items()}
        for block in self.blocks:
            by_expert = block(by_expert, cos_sin, routing, attend)
        return by_expert

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states of the first stream [n, D] -> [n, V]."""
        return self.head(self.norms[self.config.experts[0]](x))
