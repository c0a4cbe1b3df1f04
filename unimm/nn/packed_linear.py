"""A model made ready to decode on a CPU: the same one, with its large linears packed for few rows."""
import copy
import logging
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from unimm.nn.few_rows import can_pack, pack
from unimm.nn.layers import Int8Linear, PackedLinear

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)


def prepared(model: M, *, but: Sequence[str] = (), int8: Sequence[str] = ()) -> M:
    """Another model over the same parameters whose large linears are packed, those below the parts `but` left as they are.

    Those below the parts `int8` are kept in int8 instead. Raises ValueError for int8 where the CPU, or PyTorch, has none.
    """
    if int8 and not can_pack():
        raise ValueError("int8 needs PyTorch's x86 engine: expected an x86 CPU and torch.backends.quantized.engine 'x86'")
    shared = [*model.parameters(), *model.buffers()]
    ready = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    linears = [(name, part) for name, part in ready.named_modules() if isinstance(part, nn.Linear) and not _under(name, but)]
    n = 0
    for name, linear in linears:
        packed = None if _under(name, int8) else pack(linear.weight, linear.bias)
        if packed or _under(name, int8):
            ready.set_submodule(name, PackedLinear(linear, packed) if packed else Int8Linear(linear))
            n += 1
    log.info("%d of %d linears are packed", n, len(linears))
    return ready


def _under(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)
