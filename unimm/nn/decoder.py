"""The causal decoder of most families: a transformer in which each token belongs to an expert.

With one expert it is a Llama or a Qwen2. With two it is BAGEL's Mixture-of-Transformers (arXiv 2505.14683, section
2.1): a token meets the weights of its expert alone, and all tokens attend together.

Axes: N packed tokens, n tokens of one expert, A axes of a position, D model, H query heads, G key/value heads, K head,
V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.kernels import qk_norm_rope
from unimm.nn.layers import Activation, RMSNorm, SwiGLU
from unimm.nn.rope import apply_rope, mrope_cos_sin

Size = Annotated[int, range(1, 2**31)]
RowsByExpert = dict[str, Tensor]  # expert -> its rows of a pack, or something for each of them
AttentionFn = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> y


class DecoderSizes(Protocol):
    """The numbers of a causal decoder that a KV cache and a decoding need."""

    @property
    def dim(self) -> int: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def n_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def experts(self) -> tuple[str, ...]: ...


class CausalDecoder(nn.Module, ABC):
    """What generation needs of a causal decoder, whatever its blocks are: `Decoder`, or a family's own."""

    config: DecoderSizes
    embed: nn.Embedding
    n_cached_heads: int  # of the keys and values that are cached; fewer where several devices share the heads

    @abstractmethod
    def forward(self, x: Tensor, position_ids: Tensor, rows: RowsByExpert, attend: AttentionFn) -> RowsByExpert:
        """x [N, D], position_ids [N] or [N, A], rows {expert: [n]} -> {expert: [n, D]}, before the final norms."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Hidden states of the first expert [n, D] -> [n, V]."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Numbers of a decoder. rope_sections: rotary frequencies of each axis of a position, for positions of several
    axes. dropout: in training, of the embedded rows and of what attention and feed-forward add to them; whoever calls
    the decoder has attention drop, too."""

    dim: Size
    n_layers: Annotated[int, range(1, 10_001)]
    n_heads: Size
    n_kv_heads: Size
    mlp_dim: Size
    vocab_size: Size
    max_positions: Size
    rope_theta: Annotated[float, "positive"]
    norm_eps: Annotated[float, "positive"]
    act: Activation
    qkv_bias: bool
    qk_norm: bool
    experts: tuple[str, ...]
    rope_sections: tuple[int, ...] = ()
    tie_word_embeddings: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"dim {self.dim} must be a multiple of n_heads {self.n_heads}, and that of n_kv_heads {self.n_kv_heads}"
            )
        if self.rope_sections and sum(self.rope_sections) != self.head_dim // 2:
            raise ValueError(
                f"got rotary sections {self.rope_sections} in the config: expected a sum of {self.head_dim // 2}, "
                "half a head"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"got a dropout of {self.dropout} in the config: expected 0 or more, and below 1")

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.dim // self.n_heads


class ExpertRouting:
    """The rows of a batch that belong to each expert; from pack order to rows by expert and back."""

    def __init__(self, rows: RowsByExpert):
        """rows: the indices of each expert's rows, [n]."""
        self.rows = {name: index for name, index in rows.items() if len(index)}
        self.sizes = [len(index) for index in self.rows.values()]
        self.packed_order = torch.cat(list(self.rows.values())).argsort()

    def split(self, x: Tensor) -> RowsByExpert:
        """x [N, ...] -> {expert: [n, ...]}."""
        if len(self.rows) == 1:
            return dict.fromkeys(self.rows, x)
        return {name: x.index_select(0, index) for name, index in self.rows.items()}

    def join(self, by_expert: RowsByExpert) -> Tensor:
        """{expert: [n, ...]} -> [N, ...]."""
        if len(by_expert) == 1:
            return next(iter(by_expert.values()))
        return torch.cat([by_expert[name] for name in self.rows]).index_select(0, self.packed_order)


class ExpertWeights(nn.Module):
    """The weights of one expert in a block: what comes before attention, and what comes after it."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        dim = config.dim
        head_dim = config.head_dim
        eps = config.norm_eps
        self.head_dim = head_dim
        self.attn_norm = RMSNorm(dim, eps)
        self.q = nn.Linear(dim, config.n_heads * head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(dim, config.n_kv_heads * head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(dim, config.n_kv_heads * head_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.n_heads * head_dim, dim, bias=False)
        self.q_norm = RMSNorm(head_dim, eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps) if config.qk_norm else nn.Identity()
        self.mlp_norm = RMSNorm(dim, eps)
        self.mlp = SwiGLU(dim, config.mlp_dim, config.act)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def project_qkv(self, x: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, D], cos_sin [2, n, K/2] -> q [n, H, K], k and v [n, G, K]; q and k normalised and rotated."""
        h = self.attn_norm(x)
        q, k, v = (rearrange(linear(h), "n (h k) -> n h k", k=self.head_dim) for linear in (self.q, self.k, self.v))
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            q, k = qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, cos_sin, self.q_norm.eps)
        else:
            q = apply_rope(q, cos_sin)
            k = apply_rope(k, cos_sin)
        # under autocast cos_sin is float32; the released code, too, casts back here
        return q.to(v.dtype), k.to(v.dtype), v

    def output_and_mlp(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream x [n, D] and attention's output y [n, H, K] -> [n, D]."""
        x = x + self.dropout(self.out_proj(rearrange(y, "n h k -> n (h k)")))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class DecoderBlock(nn.Module):
    """Experts project apart and attend together; with one expert, a plain pre-norm block."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.experts = nn.ModuleDict({name: ExpertWeights(config) for name in config.experts})

    def forward(
        self, x: RowsByExpert, cos_sin: RowsByExpert, routing: ExpertRouting, attend: AttentionFn
    ) -> RowsByExpert:
        """x {expert: [n, D]}, cos_sin {expert: [2, n, K/2]} -> {expert: [n, D]}."""
        experts: dict[str, ExpertWeights] = {name: self.experts.get_submodule(name) for name in x}  # type: ignore[misc]
        projected = {name: experts[name].project_qkv(rows, cos_sin[name]) for name, rows in x.items()}
        q, k, v = (routing.join({name: qkv[i] for name, qkv in projected.items()}) for i in range(3))
        y = routing.split(attend(self.layer, q, k, v))
        return {name: experts[name].output_and_mlp(rows, y[name]) for name, rows in x.items()}


class TiedHead(nn.Module):
    """A language head whose weight is the table of embeddings; it holds no parameter of its own."""

    def __init__(self, embed: nn.Embedding):
        super().__init__()
        self.embedding = (embed,)  # in a tuple, so that it is no submodule: its weight would have two names

    @property
    def weight(self) -> Tensor:
        """[V, D]."""
        return self.embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Decoder(CausalDecoder):
    """Token embedding, blocks, a final norm for each expert, and the language head."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.n_cached_heads = config.n_kv_heads
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.n_layers))
        self.norms = nn.ModuleDict({name: RMSNorm(config.dim, config.norm_eps) for name in config.experts})
        tied = config.tie_word_embeddings
        self.head = TiedHead(self.embed) if tied else nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor, rows: RowsByExpert, attend: AttentionFn) -> RowsByExpert:
        """x [N, D], position_ids [N] or [N, A], rows {expert: [n]} -> {expert: [n, D]}, before the final norms."""
        config = self.config
        routing = ExpertRouting(rows)
        rope = (config.head_dim, config.rope_theta, config.rope_sections, x.dtype)
        cos_sin = {name: mrope_cos_sin(ids, *rope) for name, ids in routing.split(position_ids).items()}
        by_expert = routing.split(self.dropout(x))
        for block in self.blocks:
            by_expert = block(by_expert, cos_sin, routing, attend)
        return by_expert

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states of the first expert [n, D] -> [n, V]."""
        return self.head(self.norms[self.config.experts[0]](x))
