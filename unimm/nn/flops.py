"""The floating-point operations of a training step: what each matrix meets, forward and backward.

A product of n rows by a matrix of P numbers is 2 n P operations. Backward does as many for the gradient of the matrix,
where that is trained, and as many for the gradient of the rows, where something below is trained: 6 n P in all (Kaplan
et al. 2020, arXiv 2001.08361, section 2.1; Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Attention is counted by
the pairs of a row and a key that it attends to: what a mask hides costs nothing.

These are the model's operations, not the machine's: what is computed again (activation checkpointing, chunks of a cross
entropy) or for nothing (padding, hidden pairs) is not counted. Norms, activations, rotations, biases, sums and lookups
are left out, too: they are no products of matrices.

Axes: N rows, P numbers of a matrix, H heads, K head. A flag `carries` says whether a tensor has a gradient.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from unimm.nn.decoder import Decoder, DecoderBlock, DecoderConfig, ExpertWeights
from unimm.nn.layers import EncoderBlock, SwiGLU

MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# products of n pairs by the width of a head in attention: scores, and the mean of the values
ATTENTION_PRODUCTS = 2


def is_trained(*modules: nn.Module) -> bool:
    """Whether a parameter of one of these has a gradient."""
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


class StepFlops:
    """A sum over the layers of a step, in the order of the forward pass; FLOPs in `forward`, `backward`, `total`.

    Its methods return whether the output of what they count has a gradient.
    """

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    @property
    def total(self) -> int:
        """Of the whole step."""
        return self.forward + self.backward

    def matrix(self, weight: Tensor, rows: int, carries: bool) -> bool:
        """A product of N rows, which have a gradient or not, by a matrix; of a convolution, N counts positions of its
        output."""
        flops = 2 * rows * weight.numel()
        self.forward += flops
        self.backward += flops * (int(weight.requires_grad) + int(carries))
        return carries or weight.requires_grad

    def chain(self, rows: int, carries: bool, *modules: nn.Module) -> bool:
        """Modules whose layers, in the order in which they are defined, meet N rows, one layer after another."""
        for layer in (layer for module in modules for layer in module.modules()):
            if isinstance(layer, MATRIX_LAYERS):
                self.matrix(layer.weight, rows, carries)
            carries = carries or any(p.requires_grad for p in layer.parameters(recurse=False))
        return carries

    def side_by_side(self, rows: int, carries: bool, *modules: nn.Module) -> tuple[bool, ...]:
        """Modules that meet the same N rows each."""
        return tuple(self.chain(rows, carries, module) for module in modules)

    def attention(self, pairs: int, n_heads: int, head_dim: int, *, q: bool, k: bool, v: bool) -> bool:
        """Attention of so many pairs of a row and a key; q, k, v: which of them have a gradient."""
        flops = 2 * pairs * n_heads * head_dim
        self.forward += ATTENTION_PRODUCTS * flops
        # of the values; of the scores, from which those of queries and keys are made
        self.backward += flops * (int(v) + int(q or k) + int(q) + int(k))
        return q or k or v

    def linear_attention(self, rows: int, n_heads: int, head_dim: int, carries: bool) -> bool:
        """Attention without a softmax (unimm.nn.linear_attention): k^T v, its product with q, and the denominators."""
        flops = 2 * rows * n_heads * (2 * head_dim**2 + head_dim)
        self.forward += flops
        self.backward += 2 * flops * int(carries)
        return carries

    def add_forward(self, other: "StepFlops") -> None:
        """Add what runs without gradients: the forward pass of another count alone."""
        self.forward += other.forward


def swiglu_flops(count: StepFlops, mlp: SwiGLU, rows: int, carries: bool) -> bool:
    """A gated feed-forward over N rows."""
    return count.chain(rows, any(count.side_by_side(rows, carries, mlp.gate, mlp.up)), mlp.down)


def encoder_block_flops(count: StepFlops, block: EncoderBlock, rows: int, pairs: int, carries: bool) -> bool:
    """A ViT's block over N rows that attend to so many pairs."""
    normed = carries or is_trained(block.attn_norm)
    q, k, v = count.side_by_side(rows, normed, block.q, block.k, block.v)
    dim = block.out_proj.in_features
    y = count.attention(pairs, dim // block.head_dim, block.head_dim, q=q, k=k, v=v)
    return count.chain(rows, count.chain(rows, y, block.out_proj) or carries, block.mlp_norm, block.mlp)


def decoder_flops(
    count: StepFlops,
    decoder: Decoder,
    rows: Mapping[str, int],
    pairs: int,
    carries: Mapping[str, bool],
    *,
    with_loss: Collection[str] | None = None,
    prefix_carries: bool = False,
) -> dict[str, bool]:
    """The blocks of a decoder over so many rows of each expert, which attend to so many pairs.

    carries: of each expert's embedded rows; prefix_carries: of those of a prefix whose keys and values these rows attend
    to, and which ran through the same blocks. with_loss: experts whose last hidden states reach a loss, or another
    trained layer; all unless given. What follows the last attention is not trained by the others' rows.
    """
    rows = {name: n for name, n in rows.items() if n}
    flags = {name: carries[name] for name in rows}
    for block in decoder.blocks:
        is_last = block is decoder.blocks[-1]
        used = set(rows) if with_loss is None or not is_last else set(with_loss)
        flags = _decoder_block_flops(
            count, block, rows, flags, pairs=pairs, used=used, prefix=prefix_carries, config=decoder.config
        )
    return flags


def _decoder_block_flops(
    count: StepFlops,
    block: nn.Module,
    rows: Mapping[str, int],
    carries: Mapping[str, bool],
    *,
    pairs: int,
    used: Collection[str],
    prefix: bool,
    config: DecoderConfig,
) -> dict[str, bool]:
    assert isinstance(block, DecoderBlock), "a decoder is made of its blocks"
    experts = {name: cast("ExpertWeights", block.experts.get_submodule(name)) for name in rows}
    unused = StepFlops()
    # where no row is used any more, keys and values alone may be: by rows that are counted elsewhere
    queries = count if used else unused
    flags = [_expert_qkv_flops(count, queries, experts[name], rows[name], carries[name]) for name in rows]
    # queries, keys and values of all experts are joined: one that has a gradient gives it to all
    q, k, v = (any(of_experts) for of_experts in zip(*flags, strict=True))
    y = queries.attention(pairs, config.n_heads, config.head_dim, q=q, k=k or prefix, v=v or prefix)
    out = {}
    for name, n in rows.items():
        part = count if name in used else unused
        expert = experts[name]
        x = part.chain(n, y, expert.out_proj) or carries[name]
        out[name] = swiglu_flops(part, expert.mlp, n, x or is_trained(expert.mlp_norm)) or x
    count.add_forward(unused)
    return out


def _expert_qkv_flops(
    count: StepFlops, queries: StepFlops, expert: ExpertWeights, rows: int, carries: bool
) -> tuple[bool, bool, bool]:
    """queries: the count that those are added to."""
    normed = carries or is_trained(expert.attn_norm)
    q = queries.chain(rows, normed, expert.q)
    k, v = count.side_by_side(rows, normed, expert.k, expert.v)
    return q or is_trained(expert.q_norm), k or is_trained(expert.k_norm), v


def head_flops(count: StepFlops, decoder: Decoder, rows: int, carries: bool) -> None:
    """The final norm of the first expert and the language head over N rows that carry a loss."""
    normed = carries or is_trained(decoder.norms[decoder.config.experts[0]])
    head = decoder.head
    assert isinstance(head.weight, Tensor), "a linear, or one tied to the embeddings"
    count.matrix(head.weight, rows, normed)


def attended_pairs(lengths: Iterable[int]) -> int:
    """Pairs of a row and a key where all rows of each of these samples attend to each other."""
    return sum(n * n for n in lengths)


def count_by_size(sizes: Iterable[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    """(height, width) of images -> each size, and how many images have it."""
    return list(Counter(sizes).items())
