"""Parts of a model that are not trained, named in recipes by prefixes of their parameters' names.

A `*` in a prefix stands for one name between dots: `decoder.blocks.*.experts.und.` is an expert of all blocks. Gradients still
pass through what is frozen; `stop_expert_gradients` ends them at an expert's rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from unimm.nn.decoder import Decoder


def has_prefix(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a name begins with one of these; `*` stands for a part of it between dots."""
    return any(re.match(re.escape(prefix).replace(r"\*", r"[^.]+"), name) for prefix in prefixes)


def check_prefixes(model: nn.Module, prefixes: Sequence[str], *, where: str, trained: bool = False) -> None:
    """Raise ValueError for a prefix that no parameter's name begins with. where: the recipe's field.

    trained: whether it must be one of a trained parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes if trained else ():
        fitting = [p for name, p in model.named_parameters() if has_prefix(name, [prefix])]
        if fitting and not any(p.requires_grad for p in fitting):
            raise ValueError(
                f"got {where} {prefix!r}, expected prefixes of trained parameters: all of these are frozen"
            )
    unused = [prefix for prefix in prefixes if not any(has_prefix(name, [prefix]) for name in names)]
    if unused:
        parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
        raise ValueError(f"got {where} {unused}, expected prefixes of parameters: the model's parts are {parts}")


def freeze(model: nn.Module, frozen: Sequence[str], *, always: Sequence[str] = ()) -> None:
    """Train all parameters but those whose names begin with one of these.

    Raises ValueError for a prefix among `frozen` that no parameter has; those of `always` may be absent.
    """
    check_prefixes(model, frozen, where="frozen")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not has_prefix(name, (*always, *frozen)))


def stop_expert_gradients(decoder: Decoder, name: str) -> None:
    """Freeze an expert, its norm and the embeddings, and let no gradient pass through the expert's rows: what is trained
    learns by the other experts' rows alone, as if the states of this one's were given."""
    for parameter, p in decoder.named_parameters():
        if has_prefix(parameter, (f"blocks.*.experts.{name}.", f"norms.{name}.", "embed.")):
            p.requires_grad_(False)

    def detach(by_expert: Any) -> Any:
        return {one: rows.detach() if one == name else rows for one, rows in by_expert.items()}

    for block in decoder.blocks:
        block.register_forward_pre_hook(lambda _, args: (detach(args[0]), *args[1:]))
    decoder.register_forward_hook(lambda _, args, output: detach(output))
