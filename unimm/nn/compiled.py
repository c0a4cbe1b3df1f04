"""Regional compilation: what repeats is compiled once, and attention, loops and the lengths of prompts stay in Python.

Of a decoder's block the layers before and after attention are compiled, of other parts the forward pass. Layers of equal
shapes share a graph; numbers of rows are symbols of it, so that another prompt needs none of its own.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import nn

from unimm.nn.decoder import ExpertWeights


def compile_experts(model: nn.Module, *, backend: str | Callable = "inductor") -> None:
    """Compile the layers before and after attention of every block of the decoders in a model."""
    for module in model.modules():
        if isinstance(module, ExpertWeights):
            for name in ("project_qkv", "output_and_mlp"):
                compile_method(module, name, backend=backend)


def compile_blocks(blocks: Iterable[nn.Module], *, backend: str | Callable = "inductor") -> None:
    """Compile the forward pass of modules, for any batch and any size."""
    for block in blocks:
        compile_method(block, "forward", backend=backend)


def compile_method(module: nn.Module, name: str, *, backend: str | Callable = "inductor") -> None:
    """Compile a method of this one module, for inputs of any size.

    Modules of a class share what is compiled. It is bound as a method, so that a deep copy of the module calls it with
    itself, and not with this one.
    """
    compiled = _compile(getattr(type(module), name), backend)
    object.__setattr__(module, name, MethodType(compiled, module))


@lru_cache
def _compile(function: Callable, backend: str | Callable) -> Any:
    return torch.compile(function, dynamic=True, backend=backend)
