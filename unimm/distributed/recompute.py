"""Activation checkpointing: what a block computed is dropped after its forward, and computed again for its backward."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from unimm.kernels import attention

assert callable(attention), "its op is registered where it is imported"
# what "selective" keeps: products of matrices and attention, most of a block's work; norms, rotations and
# activations are computed again
KEPT_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.unimm.attention.default,
]


def recompute_activations(blocks: Iterable[nn.Module], *, selective: bool) -> None:
    """Let the forwards of blocks drop what they computed. selective: but for products of matrices and attention.

    A block's inputs and the random state before it are kept.
    """
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, KEPT_OPS)} if selective else {}
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **kept)
