"""Parts of a model by the beginning of their parameters' names, as recipes say them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def check_prefixes(model: nn.Module, prefixes: Sequence[str], *, where: str) -> None:
    """Raise ValueError for a beginning that no parameter has. where: the recipe's field."""
    names = [name for name, _ in model.named_parameters()]
    if lost := [beginning for beginning in prefixes if not any(name.startswith(beginning) for name in names)]:
        parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
        raise ValueError(f"got {where} {lost}, expected beginnings of parameters: the model's parts are {parts}")


def freeze(model: nn.Module, frozen: Sequence[str], *, always: Sequence[str] = ()) -> None:
    """Leave out of training what begins with one of these. Raises ValueError for a beginning that no parameter has."""
    check_prefixes(model, frozen, where="frozen")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith((*always, *frozen)))
