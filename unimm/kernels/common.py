"""What the ops share: rows of a tensor, and the dtypes of autocast."""

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] -> [N, D] whose rows are dense, at any distance; a copy only where that cannot be a view."""
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def contiguous_heads(x: Tensor) -> Tensor:
    """x with neighbouring numbers of a head side by side; a gradient may come expanded from a single number."""
    return x if x.stride(-1) == 1 else x.contiguous()


def autocast_tensors(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's dtype where it is on: PyTorch does so for its own matrix products only."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has none
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(device)) for t in tensors]


def tensor_shapes(*tensors: Tensor) -> list[tuple[int, ...]]:
    """For the texts of errors."""
    return [tuple(t.shape) for t in tensors]
