"""Representation alignment: hidden states of noised images are drawn to a vision encoder's features of the clean ones.

The loss of a token is 1 - cos(h(q), f), over the patches of an image: f are the features of the vision encoder for
understanding, without a gradient; q the hidden states of the noised image behind one of the decoder's first blocks; h a
small network that is trained along and is no part of a release. Yu et al. 2024, arXiv 2410.06940, section 3; JanusFlow's
third loss, L_REPA (arXiv 2411.07975, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.training.lora_config import LoRAConfig

# the name that the network h has in a model
HEAD = "alignment_head"
# the loss's name
LOSS = "align"


class AlignmentHead(nn.Sequential):
    """The network h: hidden states [n, D] to features [n, F], by three layers."""

    def __init__(self, dim: int, feature_dim: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, feature_dim))


def add_alignment_head(
    model: nn.Module, *, block: int, n_blocks: int, dim: int, feature_dim: int, device: torch.device, seed: int
) -> None:
    """Add the network h to a model whose hidden states of `dim` behind a block, counted from 1, are aligned.

    Raises ValueError where there is no such block.
    """
    if block > n_blocks:
        raise ValueError(f"got alignment_block {block} for {n_blocks} blocks: expected one of them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = AlignmentHead(dim, feature_dim)
    model.add_module(HEAD, head.to(device))


def check_no_adapter(block: int | None, lora: LoRAConfig | None) -> None:
    """Raise ValueError for an alignment beside an adapter, which alone would be trained."""
    if block and lora is not None:
        raise ValueError(
            "got alignment_block and lora, where the adapter alone is trained, and the network that aligns would not be: "
            "leave one out"
        )


def with_alignment(losses: tuple[str, ...], block: int | None) -> tuple[str, ...]:
    """The names of a task's losses, and that of the alignment where there is one."""
    return (*losses, LOSS) if block else losses


def alignment_losses(predicted: Tensor, features: Tensor) -> Tensor:
    """1 - the cosine similarity of each row, of predicted features and those of the images [..., F] -> [...]."""
    return 1 - F.cosine_similarity(predicted.float(), features.float(), dim=-1)


def resize_features(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features of images in square grids of patches [P, n, F] at the places of another grid [P, h w, F], bilinearly."""
    side = round(features.shape[1] ** 0.5)
    if grid == (side, side):
        return features
    grids = rearrange(features, "P (h w) F -> P F h w", h=side)
    return rearrange(F.interpolate(grids, grid, mode="bilinear"), "P F h w -> P (h w) F")


@contextmanager
def recorded_outputs(module: nn.Module | None) -> Iterator[list[Any]]:
    """What a module returns in the body, call by call; nothing for None."""
    outputs: list[Any] = []
    if module is None:
        yield outputs
        return
    handle = module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def without_new_head(targets: Mapping[str, Tensor], loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors to load from a release, or from a run that trained without a head: all but the head's."""
    return {name: x for name, x in targets.items() if not name.startswith(f"{HEAD}.") or name in loaded}


@contextmanager
def without_head(model: nn.Module) -> Iterator[None]:
    """Leave the head out of a model in the body, in which the model is saved."""
    head = getattr(model, HEAD, None)
    if head is None:
        yield
        return
    delattr(model, HEAD)
    try:
        yield
    finally:
        model.add_module(HEAD, head)
