"""Parts of a model that are not trained, named in recipes by prefixes of their parameters' names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def check_prefixes(model: nn.Module, prefixes: Sequence[str], *, where: str) -> None:
    """Raise ValueError for a prefix that no parameter's name begins with. where: the recipe's field."""
    names = [name for name, _ in model.named_parameters()]
    unused = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in names)]
    if unused:
        parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
        raise ValueError(f"got {where} {unused}, expected prefixes of parameters: the model's parts are {parts}")


def freeze(model: nn.Module, frozen: Sequence[str], *, always: Sequence[str] = ()) -> None:
    """Train all parameters but those whose names begin with one of these.

    Raises ValueError for a prefix among `frozen` that no parameter has; those of `always` may be absent.
    """
    check_prefixes(model, frozen, where="frozen")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith((*always, *frozen)))
