"""Linears whose weights are packed for few rows, which makes decoding on a CPU faster."""

import copy
import logging
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.nn.cpu_units import prefers_bfloat16
from unimm.nn.quantized_linear import QuantizedLinear, can_pack, check_can_pack

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
MIN_PACKED_WEIGHTS = 2**18  # smaller matrices stay in the cache, where packing gains nothing


class PackedFloat16:
    """Weights in bfloat16 or float16 as float16, which has the bits for them; products and sums in float32."""

    MAX_ROWS: ClassVar = 8  # rows; more are faster the plain way
    MAX_RELATIVE_LOSS: ClassVar = 2.0**-16  # of the weights' norm may be lost: those below float16's smallest

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.packed = _prepack_float16(weight.half(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, F], in x's dtype."""
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)

    @staticmethod
    def rounding_error(weight: Tensor) -> Tensor:
        """The rounding error of each packed weight."""
        return weight.float() - weight.half().float()


class SplitFloat16:
    """Weights in float32 as high + low / 2048, both float16: off by at most the last bit of each."""

    MAX_ROWS: ClassVar = 16
    MAX_RELATIVE_LOSS: ClassVar = 2.0**-24
    LOW_SCALE: ClassVar = 2048.0  # 2^11: float16 has 11 bits

    def __init__(self, weight: Tensor, bias: Tensor | None):
        both = torch.cat(self.split(weight))
        self.packed = _prepack_float16(both, None if bias is None else torch.cat((bias, torch.zeros_like(bias))))

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, F], in x's dtype."""
        high, low = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).chunk(2, -1)
        return torch.add(high, low, alpha=1 / self.LOW_SCALE).to(x.dtype)

    @classmethod
    def split(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """high and low, [F, D] float16."""
        high = weight.half()
        return high, ((weight - high) * cls.LOW_SCALE).half()

    @classmethod
    def rounding_error(cls, weight: Tensor) -> Tensor:
        """The rounding error of each packed weight."""
        high, low = cls.split(weight)
        return weight - high - low.float() / cls.LOW_SCALE


def pack_weight(weight: Tensor, bias: Tensor | None) -> PackedFloat16 | SplitFloat16 | None:
    """A packed copy of weights [F, D]; None where packing gains nothing or is not exact.

    A matrix with weights beyond float16's range, or with tiny ones alone, is not packed; nor is one in half precision
    where a CPU has tiles for bfloat16, which read as few bytes.
    """
    classes: dict[torch.dtype, type[PackedFloat16] | type[SplitFloat16]] = {
        torch.bfloat16: PackedFloat16,
        torch.float16: PackedFloat16,
        torch.float32: SplitFloat16,
    }
    packed_class = classes.get(weight.dtype)
    if packed_class is None or not weight.is_cpu or weight.numel() < MIN_PACKED_WEIGHTS or not can_pack():
        return None
    if weight.dtype != torch.float32 and prefers_bfloat16(weight.device):
        return None
    weight = weight.detach()
    if (
        not packed_class.rounding_error(weight).norm() <= packed_class.MAX_RELATIVE_LOSS * weight.float().norm()
    ):  # nan, too, where a weight is too large
        return None
    return packed_class(weight, None if bias is None else bias.detach())


def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedFloat16 | SplitFloat16 | None
) -> Tensor:
    """F.linear(x, weight, bias), x [..., D] -> [..., F]; few rows without gradients go through `packed`, the same
    weights."""
    rows = x.numel() // x.shape[-1]
    if packed is None or rows > packed.MAX_ROWS or not x.is_cpu or torch.is_grad_enabled():
        return packed_linear_reference(x, weight, bias)
    return packed(x)


def packed_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition."""
    return F.linear(x, weight, bias)


def _prepack_float16(weight: Tensor, bias: Tensor | None) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())


class PackedLinear(nn.Module):
    """A linear over the weights of another, of which it has a packed copy for few rows."""

    def __init__(self, linear: nn.Linear, packed: PackedFloat16 | SplitFloat16):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, self.bias, self.packed)


def optimize_for_cpu(model: M, *, skip: Sequence[str] = (), int8: Sequence[str] = ()) -> M:
    """A copy of the model over the same parameters whose large linears are packed.

    skip: submodules whose linears are not packed. int8: submodules whose linears are rounded to int8.
     Raises ValueError for int8 where the CPU, or PyTorch, has none.
    """
    if int8:
        check_can_pack()
    shared = [*model.parameters(), *model.buffers()]
    optimized = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    linears = [
        (name, part)
        for name, part in optimized.named_modules()
        if isinstance(part, nn.Linear) and not _is_below(name, skip)
    ]
    n = 0
    for name, linear in linears:
        packed = None if _is_below(name, int8) else pack_weight(linear.weight, linear.bias)
        if packed or _is_below(name, int8):
            optimized.set_submodule(
                name, PackedLinear(linear, packed) if packed else QuantizedLinear.of(linear, "int8")
            )
            n += 1
    log.info("packed %d of %d linears", n, len(linears))
    return optimized


def _is_below(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)
