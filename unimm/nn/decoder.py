"""The transformer decoder of every family: streams that project apart and attend together.

One stream is a Llama or Qwen2 block. Two are BAGEL's Mixture-of-Transformers (arXiv 2505.14683, section 2.1): each
token belongs to one expert, whose weights alone it meets, and all tokens attend together.

Axes: N packed tokens, n tokens of one stream, D model, H query heads, G key/value heads, K head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.kernels import qk_norm_rope
from unimm.nn.layers import RMSNorm, SwiGLU
from unimm.nn.rope import apply_rope, rope

Parts = dict[str, Tensor]  # stream -> its tokens
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> y


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_dim: int
    vocab: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    act: str
    qkv_bias: bool
    qk_norm: bool
    streams: tuple[str, ...]  # who owns weights in a block
    rope_sections: tuple[int, ...] = ()  # rotary frequencies of each axis, where positions have several
    tied: bool = False  # the language head is the table of embeddings

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"dim {self.dim} must be a multiple of n_heads {self.n_heads}, and that of n_kv_heads {self.n_kv_heads}"
            )
        if self.rope_sections and sum(self.rope_sections) != self.head_dim // 2:
            raise ValueError(
                f"got rotary sections {self.rope_sections} in the config: expected a sum of {self.head_dim // 2}, half a head"
            )

    FILES: ClassVar = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_dim": "intermediate_size",
        "vocab": "vocab_size",
        "max_positions": "max_position_embeddings",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "act": "hidden_act",
        "qk_norm": "qk_norm",
    }

    @classmethod
    def from_files(
        cls,
        files: Mapping[str, Any],
        *,
        qkv_bias: bool,
        streams: tuple[str, ...],
        rope_sections: tuple[int, ...] = (),
        tied: bool = False,
    ) -> "DecoderConfig":
        """Read a Llama- or Qwen2-like config.json. Raises ValueError where a number is missing."""
        if lost := [theirs for theirs in cls.FILES.values() if theirs not in files]:
            raise ValueError(
                f"the language model's config lacks {', '.join(lost)}: expected the released llm_config.json"
            )
        known = {ours: files[theirs] for ours, theirs in cls.FILES.items()}
        return cls(**known, qkv_bias=qkv_bias, streams=streams, rope_sections=rope_sections, tied=tied)

    @classmethod
    def from_llama(cls, files: Mapping[str, Any], *, stream: str) -> "DecoderConfig":
        """Read a Llama config.json: LlamaConfig's own values for what is missing. Raises ValueError for what is not built."""
        files = {**LLAMA, **{key: value for key, value in files.items() if value is not None}}
        files = {"num_key_value_heads": files.get("num_attention_heads"), "qk_norm": False, **files}
        files |= {key: value for key, value in files.get("rope_parameters", {}).items() if key == "rope_theta"}
        kind = files.get("rope_parameters", {}).get("rope_type", "default")
        heads = files.get("num_attention_heads", 1)
        refused = {
            "rope_scaling": "rope_scaling" in files or kind != "default",
            "attention_bias": files["attention_bias"],
            "mlp_bias": files["mlp_bias"],
            "tie_word_embeddings": files["tie_word_embeddings"],
            "head_dim": "head_dim" in files and files["head_dim"] * heads != files["hidden_size"],
        }
        if wrong := [name for name, found in refused.items() if found]:
            raise ValueError(
                f"the language model's config asks for {', '.join(wrong)}, which no release does and is not built"
            )
        return cls.from_files(files, qkv_bias=False, streams=(stream,))

    def to_files(self) -> dict[str, Any]:
        """The mapping that `from_files` reads."""
        return {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()} | {"tie_word_embeddings": self.tied}

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


# Janus's releases leave these out: what LlamaConfig says where a config is silent
LLAMA = {
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


class Route:
    """Which rows of a pack belong to which stream; from pack order to stream order and back."""

    def __init__(self, rows: Parts):
        self.rows = {name: at for name, at in rows.items() if len(at)}
        self.sizes = [len(at) for at in self.rows.values()]
        self.order = torch.cat(list(self.rows.values())).argsort()

    def split(self, x: Tensor) -> Parts:
        """x [N, ...] -> {stream: [n, ...]}."""
        if len(self.rows) == 1:
            return dict.fromkeys(self.rows, x)
        return {name: x.index_select(0, at) for name, at in self.rows.items()}

    def join(self, parts: Parts) -> Tensor:
        """{stream: [n, ...]} -> [N, ...]."""
        if len(parts) == 1:
            return next(iter(parts.values()))
        return torch.cat([parts[name] for name in self.rows]).index_select(0, self.order)


class Stream(nn.Module):
    """What one kind of token owns in a block: its way into attention and its way out."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.q = nn.Linear(cfg.dim, cfg.n_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.k = nn.Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.v = nn.Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.o = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.dim, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.mlp_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = SwiGLU(cfg.dim, cfg.mlp_dim, cfg.act)

    def enter(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, D], angles [2, n, K/2] -> q [n, H, K], k and v [n, G, K], q and k normed and turned."""
        h = self.attn_norm(x)
        q, k, v = (rearrange(p(h), "n (h k) -> n h k", k=self.head_dim) for p in (self.q, self.k, self.v))
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            q, k = qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, angles, self.q_norm.eps)
        else:
            q, k = apply_rope(q, angles), apply_rope(k, angles)
        # under autocast the angles are float32; the released code, too, casts back here
        return q.to(v.dtype), k.to(v.dtype), v

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream x [n, D] and attention's output y [n, H, K] -> [n, D]."""
        x = x + self.o(rearrange(y, "n h k -> n (h k)"))
        return x + self.mlp(self.mlp_norm(x))


class Block(nn.Module):
    """Streams project apart and attend together; with one stream, a plain decoder block."""

    def __init__(self, cfg: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.streams = nn.ModuleDict({name: Stream(cfg) for name in cfg.streams})

    def forward(self, x: Parts, angles: Parts, route: Route, attend: Attend) -> Parts:
        """x {stream: [n, D]}, angles {stream: [2, n, K/2]} -> {stream: [n, D]}."""
        streams: dict[str, Stream] = {name: self.streams.get_submodule(name) for name in x}  # type: ignore[misc]
        entered = {name: streams[name].enter(part, angles[name]) for name, part in x.items()}
        q, k, v = (route.join({name: qkv[i] for name, qkv in entered.items()}) for i in range(3))
        y = route.split(attend(self.layer, q, k, v))
        return {name: streams[name].leave(part, y[name]) for name, part in x.items()}


class TiedHead(nn.Module):
    """A language head whose weight is the table of embeddings; it holds no parameter of its own."""

    def __init__(self, embed: nn.Embedding):
        super().__init__()
        self.table = (embed,)  # no part of this module: its weight would have two names

    @property
    def weight(self) -> Tensor:
        """[V, D]."""
        return self.table[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def turns(positions: Tensor, cfg: DecoderConfig, dtype: torch.dtype) -> Tensor:
    """Rotary angles [2, N, K/2] of positions [N]; or of [N, A], where each axis turns the frequencies of its section.

    M-RoPE, arXiv 2409.12191, section 2.1: with equal axes it is the rotation of one.
    """
    if positions.ndim == 1:
        return rope(positions, cfg.head_dim, cfg.rope_theta, dtype)
    axes = [rope(at, cfg.head_dim, cfg.rope_theta, dtype).split(cfg.rope_sections, -1) for at in positions.unbind(1)]
    return torch.cat([parts[i] for i, parts in enumerate(axes)], -1)


class Decoder(nn.Module):
    """Token embedding, blocks, a final norm for each stream, and the language head."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.norms = nn.ModuleDict({name: RMSNorm(cfg.dim, cfg.norm_eps) for name in cfg.streams})
        self.head = TiedHead(self.embed) if cfg.tied else nn.Linear(cfg.dim, cfg.vocab, bias=False)

    def forward(self, x: Tensor, positions: Tensor, rows: Parts, attend: Attend) -> Parts:
        """x [N, D], positions [N] or [N, axes], rows {stream: [n]} -> {stream: [n, D]}, before the final norms."""
        route = Route(rows)
        parts = route.split(x)
        angles = {name: turns(at, self.cfg, x.dtype) for name, at in route.split(positions).items()}
        for block in self.blocks:
            parts = block(parts, angles, route, attend)
        return parts

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states of the first stream [n, D] -> [n, V]."""
        return self.head(self.norms[self.cfg.streams[0]](x))
