"""Representation alignment: hidden states of noised images are drawn to a vision encoder's features of the clean ones.

The loss of a token is 1 - cos(h(q), f), over the patches of an image: f are the features of the vision encoder for
understanding, without a gradient; q the hidden states of the noised image behind one of the decoder's first blocks; h a
small network that is trained along and is no part of a release. JanusFlow's third loss, L_REPA (arXiv 2411.07975,
section 3), after Yu et al. (arXiv 2410.06940).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# the name that the network h has in a model
HEAD = "alignment_head"
# the loss's name
LOSS = "align"


class AlignmentHead(nn.Sequential):
    """The network h: hidden states [n, D] to features [n, F], by three layers."""

    def __init__(self, dim: int, feature_dim: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, feature_dim))


def alignment_losses(predicted: Tensor, features: Tensor) -> Tensor:
    """1 - the cosine similarity of each row [n], of predicted features and those of the images [n, F]."""
    return 1 - F.cosine_similarity(predicted.float(), features.float(), dim=-1)


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
