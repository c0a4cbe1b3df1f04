"""Helpers of the ops: rows of a tensor, and the dtype of autocast."""

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] -> [N, D] with contiguous rows at any distance; copies only where a view is impossible."""
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def contiguous_heads(x: Tensor) -> Tensor:
    """x with the numbers of a head contiguous: a gradient may arrive expanded from a single number, with stride 0."""
    return x if x.stride(-1) == 1 else x.contiguous()


def autocast_tensors(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's dtype where it is on, which PyTorch applies to its own matrix products only."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # there is no autocast for meta
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(device)) for t in tensors]


def tensor_shapes(*tensors: Tensor) -> list[tuple[int, ...]]:
    """The shapes of tensors, for error messages."""
    return [tuple(t.shape) for t in tensors]
