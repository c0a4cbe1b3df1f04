"""Linears whose weights are in few bits alone, and their products on a CPU and on a GPU.

Axes: N rows, F outputs, D inputs, G groups of inputs. The products are PyTorch's own, which the tensors of torchao call as
well; where a device has none for a format, weights are multiplied out for each product.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from unimm.kernels.weight_formats import (
    CODES,
    MAX_FP8,
    MIN_SCALE,
    SCALE,
    WEIGHT_FORMATS,
    ZERO,
    StoredRows,
    WeightFormat,
    unpack_pairs,
)

QUANTIZED_ENGINES = ("x86", "fbgemm")
FP8_CAPABILITY = (8, 9)  # of the first GPUs with products in float8
INT4_CAPABILITY = (8, 0)  # of the first GPUs that PyTorch has products of int4 for


def can_pack() -> bool:
    """Whether this CPU has the packed products, and PyTorch's engine is set to one that has them."""
    return torch.backends.quantized.engine in QUANTIZED_ENGINES


def check_can_pack() -> None:
    """Raise ValueError where this CPU, or PyTorch, has no products of int8."""
    if not can_pack():
        raise ValueError(
            "int8 needs PyTorch's x86 engine: expected an x86 CPU and torch.backends.quantized.engine 'x86'; on other "
            "CPUs take int4, fp8 or nf4"
        )


class QuantizedProduct(ABC):
    """Rows times one weight in one format, on the device where it lies."""

    def __init__(self, format_: WeightFormat, stored: StoredRows):
        self.format = format_
        self.device = stored[CODES].device
        # the shapes and dtypes of what is stored, without values
        self.layout = {suffix: torch.empty_like(tensor, device="meta") for suffix, tensor in stored.items()}

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., F], in x's dtype."""

    @abstractmethod
    def stored_part(self, suffix: str) -> Tensor:
        """The weight as files hold it: its codes, or what stands beside them."""


class PackedInt8(QuantizedProduct):
    """int8 on a CPU: rows of x are rounded to 8 bits with a scale each. The product is exact in int32.

    About 1 % of error, as |y - y'| / |y|.
    """

    def __init__(self, stored: StoredRows):
        super().__init__(WEIGHT_FORMATS["int8"], stored)
        self.packed = _prepack_int8(stored[CODES], stored[SCALE])
        self.levels = 127 if _accumulates_in_int32() else 63

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=MIN_SCALE)
        return (_int8_product(wide / scale, self.levels, self.packed) * scale).to(x.dtype)

    def stored_part(self, suffix: str) -> Tensor:
        weight, _ = torch.ops.quantized.linear_unpack(self.packed)
        return weight.int_repr() if suffix == CODES else weight.q_per_channel_scales().float()


class PackedInt4(QuantizedProduct):
    """int4 on a CPU, and on a GPU of compute capability 8.0 or more: products in bfloat16, of weights in the order in
    which the processor takes them."""

    BLOCK_ROWS: ClassVar = 64  # outputs that are packed apart from all others
    ROWS_MULTIPLE: ClassVar = 16  # of outputs, which are filled up
    PACKED_AT_ONCE: ClassVar = 2**22  # weights, since a CPU's packing takes whole numbers of 32 bits

    def __init__(self, stored: StoredRows):
        super().__init__(WEIGHT_FORMATS["int4"], stored)
        self.n_outputs = len(stored[CODES])
        self.n_inputs = 2 * stored[CODES].shape[1]
        self.group_size = self.n_inputs // stored[SCALE].shape[1]
        more = (0, 0, 0, -self.n_outputs % self.ROWS_MULTIPLE)
        self.packed = self._pack(F.pad(stored[CODES], more))
        scale_and_zero = torch.stack((F.pad(stored[SCALE], more), F.pad(stored[ZERO], more)), -1)
        self.scale_and_zero = scale_and_zero.transpose(0, 1).contiguous()  # [G, F, 2]

    def __call__(self, x: Tensor) -> Tensor:
        ops = torch.ops.aten
        product = ops._weight_int4pack_mm_for_cpu if self.device.type == "cpu" else ops._weight_int4pack_mm
        rows = x.reshape(-1, self.n_inputs).bfloat16()
        y = product(rows, self.packed, self.group_size, self.scale_and_zero)[:, : self.n_outputs]
        return y.reshape(*x.shape[:-1], self.n_outputs).to(x.dtype)

    def stored_part(self, suffix: str) -> Tensor:
        n = self.n_outputs
        if suffix != CODES:
            return self.scale_and_zero[:, :n, (SCALE, ZERO).index(suffix)].t().contiguous()
        nibbles = unpack_pairs(self.packed.reshape(1, -1).view(torch.uint8)).view(-1, self.n_inputs)
        whole = len(nibbles) - len(nibbles) % self.BLOCK_ROWS
        codes = torch.cat([self._unpack(nibbles[:whole]), self._unpack(nibbles[whole:])])[:n]
        return (codes[:, ::2] << 4) | codes[:, 1::2]

    def _pack(self, codes: Tensor) -> Tensor:
        """[F, D / 2], two in a byte -> the same bits in the processor's order."""
        if codes.device.type != "cpu":
            tiles = next(n for n in (8, 4, 2) if self.n_inputs % (16 * n) == 0)  # a group is a multiple of 32
            return torch.ops.aten._convert_weight_to_int4pack(codes.contiguous(), tiles)
        blocks = max(1, self.PACKED_AT_ONCE // (self.BLOCK_ROWS * self.n_inputs))
        parts = codes.split(blocks * self.BLOCK_ROWS)
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        return torch.cat([pack(unpack_pairs(part).int(), 1) for part in parts])

    def _unpack(self, nibbles: Tensor) -> Tensor:
        """Whole blocks, or the rows that are less than one, in the processor's order -> their codes."""
        n = min(self.BLOCK_ROWS, len(nibbles)) * self.n_inputs
        if not n:
            return nibbles
        blocks = nibbles.reshape(-1, n)
        codes = torch.empty_like(blocks)
        codes[:, self._places(n)] = blocks
        return codes.view(nibbles.shape)

    def _places(self, n: int) -> Tensor:
        """Where among `n` weights each of the packed ones belongs.

        The order is the processor's own affair: it is found by packing the weights' numbers, digit by digit.
        """
        numbers = torch.arange(n, device=self.device)
        places = torch.zeros_like(numbers)
        for shift in range(0, n.bit_length(), 4):
            digits = ((numbers >> shift) & 15).to(torch.uint8).view(-1, self.n_inputs)
            packed = self._pack((digits[:, ::2] << 4) | digits[:, 1::2])
            places += unpack_pairs(packed.reshape(1, -1).view(torch.uint8)).view(-1).long() << shift
        return places


class DynamicFloat8(QuantizedProduct):
    """fp8 on a GPU of compute capability 8.9 or more: rows of x are rounded to float8, too, with a scale each."""

    WIDTH_MULTIPLE: ClassVar = 16  # of inputs and outputs

    def __init__(self, stored: StoredRows):
        super().__init__(WEIGHT_FORMATS["fp8"], stored)
        self.stored = stored

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        scale = (rows.abs().amax(-1, keepdim=True) / MAX_FP8).clamp(min=MIN_SCALE)
        codes = (rows / scale).clamp_(-MAX_FP8, MAX_FP8).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(
            codes,
            self.stored[CODES].t(),
            scale_a=scale,
            scale_b=self.stored[SCALE].unsqueeze(0),
            out_dtype=torch.bfloat16,  # what scales for rows are supported with
        )
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)

    def stored_part(self, suffix: str) -> Tensor:
        return self.stored[suffix]


class ScaledCodes(QuantizedProduct):
    """int8 and fp8 where there is no product of them: the codes in x's dtype, which holds them exactly, and scales
    afterwards."""

    def __init__(self, format_: WeightFormat, stored: StoredRows):
        super().__init__(format_, stored)
        self.stored = stored

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # sums of whole codes are beyond its range
            return F.linear(x, self.format.dequantize(self.stored).to(x.dtype))
        return (F.linear(x, self.stored[CODES].to(x.dtype)) * self.stored[SCALE]).to(x.dtype)

    def stored_part(self, suffix: str) -> Tensor:
        return self.stored[suffix]


class MultipliedOut(QuantizedProduct):
    """nf4, and int4 where there is no product of it: the weight is multiplied out for each product."""

    def __init__(self, format_: WeightFormat, stored: StoredRows):
        super().__init__(format_, stored)
        self.stored = stored

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.format.dequantize(self.stored).to(x.dtype))

    def stored_part(self, suffix: str) -> Tensor:
        return self.stored[suffix]


def quantized_product(format_: WeightFormat, stored: StoredRows) -> QuantizedProduct:
    """The product of a weight on the device where it lies."""
    device = stored[CODES].device
    if format_.NAME == "int8" and device.type == "cpu":
        check_can_pack()
        return PackedInt8(stored)
    if format_.NAME == "int4" and (device.type == "cpu" or _has_capability(device, INT4_CAPABILITY)):
        return PackedInt4(stored)
    n_outputs, n_inputs = format_.shape(tuple(stored[CODES].shape))
    is_even = n_outputs % DynamicFloat8.WIDTH_MULTIPLE == 0 and n_inputs % DynamicFloat8.WIDTH_MULTIPLE == 0
    if format_.NAME == "fp8" and is_even and _has_capability(device, FP8_CAPABILITY):
        return DynamicFloat8(stored)
    return MultipliedOut(format_, stored) if format_.HAS_GROUPS else ScaledCodes(format_, stored)


def _has_capability(device: torch.device, least: tuple[int, int]) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= least


class QuantizedLinear(nn.Module):
    """A linear with weights in few bits alone: without gradients for them. Its state dict raises ValueError: no parameter
    holds them."""

    def __init__(self, linear: nn.Linear, format_: WeightFormat, stored: StoredRows):
        """linear: gives the widths and the bias. stored: the weights, on the device where they are to be."""
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.product = quantized_product(format_, stored)
        self.bias = linear.bias
        self.register_state_dict_pre_hook(_refuse_state_dict)

    @classmethod
    def of(cls, linear: nn.Linear, format_name: str) -> Self:
        """A linear, rounded."""
        format_ = WEIGHT_FORMATS[format_name]
        return cls(linear, format_, format_.quantize(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def format(self) -> WeightFormat:
        """The format of the weights."""
        return self.product.format

    @property
    def qweight(self) -> Tensor:
        """Empty: the device of the weights, which adapters (PEFT) ask for by this name."""
        return torch.empty(0, dtype=torch.int8, device=self.product.device)

    def stored_part(self, suffix: str) -> Tensor:
        """The weights as files hold them: their codes, or what stands beside them."""
        return self.product.stored_part(suffix)

    def stored_layout(self) -> StoredRows:
        """All parts without values, by their suffixes."""
        return self.product.layout

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.product.device)).device
        if device != self.product.device:  # the dtype of rounded weights stays
            stored = {suffix: self.stored_part(suffix).to(device) for suffix in self.stored_layout()}
            self.product = quantized_product(self.format, stored)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.NAME}"


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    assert isinstance(module, QuantizedLinear), "whose hook it is"
    raise ValueError(
        f"{prefix.rstrip('.')} is in {module.format.NAME} and has no parameter for it: save the model with "
        "save_pretrained"
    )


def _prepack_int8(codes: Tensor, scale: Tensor) -> Any:
    zeros = torch.zeros(len(codes), dtype=torch.long, device="cpu")
    with warnings.catch_warnings():
        # pytorch/pytorch issue 184982: no product that will remain is as fast (onednn.qlinear_pointwise 2.2 ms against
        # 0.9)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, torch.quantize_per_channel", UserWarning)
        weight = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


def _int8_product(x: Tensor, levels: int, packed: Any) -> Tensor:
    """x [N, D] in [-1, 1], as -levels to levels, times packed weights -> [N, F]."""
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return product(x, 1 / levels, levels + 1, packed)


def _accumulates_in_int32() -> bool:
    """Whether products of 8 bits with 8 are summed in 32 bits: without VNNI pairs are summed in 16, which overflows."""
    ones = torch.ones(1, 64, device="cpu")
    packed = _prepack_int8(torch.full((1, 64), 127, dtype=torch.int8, device="cpu"), torch.tensor([1 / 127]))
    return bool(torch.isclose(_int8_product(ones, 127, packed), ones.sum()).all())
