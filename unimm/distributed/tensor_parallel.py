"""Tensor parallel inference: several devices compute each forward pass together, every one with its heads and its part of
the feed-forwards (DTensor's parallelize_module).

All processes make the same call and get the same result: everything but the split linears is computed on each.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from unimm.denoisers.mmdit import SingleStreamBlock
from unimm.distributed.ranks import Ranks
from unimm.models.base import UnifiedModel
from unimm.models.parallel_plan import LinearSplit, find_modules
from unimm.nn.decoder import CausalDecoder

# the name of the mesh's dimension
TENSOR_DIM = "tensor"


def parallelize(model: UnifiedModel, ranks: Ranks) -> None:
    """Split a model over all ranks, in place, by its family's TENSOR_PARALLEL_PLAN; the rest moves to the rank's device.

    The model is that of every rank, whole and on the CPU, so that no device has to hold all of it; of a split linear
    the first rank's weights are taken. Such a model neither trains nor saves. Raises ValueError, before anything is
    split, for numbers of heads or of hidden units that the ranks do not divide, and for quantized linears.
    """
    if ranks.size == 1:
        model.to(ranks.device)
        return
    found = _find_linears(model)
    _check(model, found, ranks.size)
    mesh = init_device_mesh(ranks.device.type, (ranks.size,), mesh_dim_names=(TENSOR_DIM,))
    for name, (linear, split) in found.items():
        _group_by_rank(linear, split, ranks.size)
        _split(model, name, split, mesh)
    for module in model.modules():
        if isinstance(module, CausalDecoder):
            module.n_cached_heads //= ranks.size
        if isinstance(module, SingleStreamBlock):
            qkv, hidden = module.split_sizes
            module.split_sizes = (qkv // ranks.size, hidden // ranks.size)
    model.to(ranks.device)


def _find_linears(model: UnifiedModel) -> dict[str, tuple[nn.Linear, LinearSplit]]:
    """The linears of a model's plan. Raises ValueError where another module stands for one."""
    found = {}
    for pattern, split in model.TENSOR_PARALLEL_PLAN.items():
        for name, module in find_modules(model, [pattern]).items():
            if isinstance(module, nn.Linear):
                found[name] = (module, split)
            elif split.kind != "gathered":  # a tied head is the table of embeddings, and has no weights of its own
                kind = type(module).__name__
                raise ValueError(f"{name} is a {kind}: tensor parallel inference takes weights as they are")
    return found


def _split(model: nn.Module, name: str, split: LinearSplit, mesh: DeviceMesh) -> None:
    styles: dict[str, ParallelStyle] = {
        "column": ColwiseParallel(),
        "row": RowwiseParallel(),
        "gathered": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, {name: styles[split.kind]})


def _sizes(linear: nn.Linear, split: LinearSplit) -> list[int]:
    """How wide the things are that stand beside each other in a column's outputs, or in a row's inputs."""
    is_row = split.kind == "row"
    total = linear.in_features if is_row else linear.out_features
    model_dim = linear.out_features if is_row else linear.in_features
    if not split.wide:
        return [total // split.equal] * split.equal
    return [model_dim] * split.wide + [total - split.wide * model_dim]


def _group_by_rank(linear: nn.Linear, split: LinearSplit, n: int) -> None:
    """Reorder a column's rows, or a row's columns, so that the parts of a rank lie side by side, in place."""
    sizes = _sizes(linear, split)
    if len(sizes) == 1:
        return
    dim = 1 if split.kind == "row" else 0
    parts = [part.chunk(n) for part in torch.arange(sum(sizes)).split(sizes)]
    order = torch.cat([part[rank] for rank in range(n) for part in parts])
    with torch.no_grad():
        linear.weight.copy_(linear.weight.index_select(dim, order.to(linear.weight.device)))
        if linear.bias is not None and dim == 0:
            linear.bias.copy_(linear.bias[order.to(linear.bias.device)])


def _check(model: nn.Module, found: dict[str, tuple[nn.Linear, LinearSplit]], n: int) -> None:
    """Raise ValueError for what n ranks cannot share."""
    for name, (linear, split) in found.items():
        if split.kind == "gathered":
            continue
        sizes = _sizes(linear, split)
        # beside heads of attention there may be a feed-forward's hidden units
        in_heads = sizes[: split.wide] if split.wide else sizes
        head_dim = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", 1)
        if any(size % n for size in sizes) or any(size // head_dim % n for size in in_heads):
            counts = sorted({size // head_dim for size in in_heads})
            what = f"heads {counts}" if head_dim > 1 else f"hidden units {sizes}"
            raise ValueError(f"{name} has {what}, which {n} processes cannot share: expected multiples of {n}")
