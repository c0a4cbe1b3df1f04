"""Weights of linears in few bits: how they are rounded, stored row by row, and multiplied out again.

Axes: F outputs, D inputs, G groups of inputs. All tensors of a format have F rows, so that the rows of a weight can be
split and joined in them as they are in the weight itself. In a file they stand under the weight's name and a suffix.

`nf4` is that of Dettmers et al. 2023, arXiv 2305.14314, section 3, without its second rounding of the scales: blocks of
those run across rows, which released layouts split.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

# the tensors of one weight by their suffixes; "" is that of its codes
StoredRows: TypeAlias = dict[str, Tensor]

CODES = ""
SCALE = "_scale"
ZERO = "_zero"
MIN_SCALE = torch.finfo(torch.float32).tiny
MAX_FP8 = torch.finfo(torch.float8_e4m3fn).max
GROUP_SIZES = (64, 32)  # inputs that share a scale: the first of these that divides the width
CHUNK_ELEMENTS = 2**22  # of a weight that are rounded at a time, so that no copy of the whole is made
# the quantiles of a normal distribution, of which 8 are positive, 7 negative and one is 0 (appendix E of the paper)
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class WeightFormat(ABC):
    """A way to hold the weights of a linear in few bits."""

    NAME: ClassVar[str]
    # of the codes in a file, and how many there are to a byte
    CODE_DTYPE: ClassVar[torch.dtype]
    CODES_A_BYTE: ClassVar[int] = 1
    # what stands beside the codes, by its suffix, in which dtype
    SIDE_DTYPES: ClassVar[Mapping[str, torch.dtype]]
    # of a linear of usual width, with what stands beside the codes
    BYTES_PER_WEIGHT: ClassVar[float]
    # whether several scales stand in a row, one for each group of inputs
    HAS_GROUPS: ClassVar[bool]

    def fits(self, n_inputs: int) -> bool:
        """Whether a linear of that many inputs can be in this format."""
        return not self.HAS_GROUPS or group_size(n_inputs) is not None

    def shape(self, codes_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the weight whose codes have this shape."""
        return (*codes_shape[:-1], codes_shape[-1] * self.CODES_A_BYTE)

    def side_shape_fits(self, codes_shape: tuple[int, ...], side_shape: tuple[int, ...]) -> bool:
        """Whether scales of this shape can stand beside codes of that one."""
        if len(codes_shape) != 2:
            return False
        if not self.HAS_GROUPS:
            return side_shape == codes_shape[:1]
        n_groups = side_shape[1] if len(side_shape) == 2 else 0
        return side_shape[:1] == codes_shape[:1] and n_groups > 0 and self.shape(codes_shape)[1] % n_groups == 0

    def quantize(self, weight: Tensor) -> StoredRows:
        """A weight [F, D], rounded."""
        n = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
        chunks = [self._quantize(rows.detach().float()) for rows in weight.split(n)]
        if len(chunks) == 1:
            return chunks[0]
        return {suffix: torch.cat([chunk[suffix] for chunk in chunks]) for suffix in chunks[0]}

    @abstractmethod
    def _quantize(self, weight: Tensor) -> StoredRows:
        """Rows [F, D] in float32, rounded."""

    @abstractmethod
    def dequantize(self, stored: StoredRows) -> Tensor:
        """The weight [F, D] in float32."""


class Int8Format(WeightFormat):
    """Codes from -127 to 127 with a scale for each row: codes [F, D] int8, scale [F]."""

    NAME = "int8"
    CODE_DTYPE = torch.int8
    SIDE_DTYPES: ClassVar = {SCALE: torch.float32}
    BYTES_PER_WEIGHT = 1.0
    HAS_GROUPS = False

    def _quantize(self, weight: Tensor) -> StoredRows:
        scale = (weight.abs().amax(1) / 127).clamp(min=MIN_SCALE)
        codes = (weight / scale[:, None]).round_().clamp_(-127, 127)
        return {CODES: codes.to(torch.int8), SCALE: scale}

    def dequantize(self, stored: StoredRows) -> Tensor:
        return stored[CODES].float() * stored[SCALE][:, None]


class Float8Format(WeightFormat):
    """Numbers of 4 bits of exponent and 3 of mantissa with a scale for each row: codes [F, D] float8_e4m3fn, scale [F]."""

    NAME = "fp8"
    CODE_DTYPE = torch.float8_e4m3fn
    SIDE_DTYPES: ClassVar = {SCALE: torch.float32}
    BYTES_PER_WEIGHT = 1.0
    HAS_GROUPS = False

    def _quantize(self, weight: Tensor) -> StoredRows:
        scale = (weight.abs().amax(1) / MAX_FP8).clamp(min=MIN_SCALE)
        return {CODES: (weight / scale[:, None]).clamp_(-MAX_FP8, MAX_FP8).to(self.CODE_DTYPE), SCALE: scale}

    def dequantize(self, stored: StoredRows) -> Tensor:
        return stored[CODES].float() * stored[SCALE][:, None]


class Int4Format(WeightFormat):
    """16 equal steps from the smallest to the largest weight of each group: codes [F, D / 2] uint8, scale and zero
    [F, G] bfloat16. A weight is (code - 8) * scale + zero; of two in a byte the first is in the high bits.

    Such are the weights that PyTorch's products of int4 take (torch.ops.aten._weight_int4pack_mm).
    """

    NAME = "int4"
    CODE_DTYPE = torch.uint8
    CODES_A_BYTE = 2
    SIDE_DTYPES: ClassVar = {SCALE: torch.bfloat16, ZERO: torch.bfloat16}
    BYTES_PER_WEIGHT = 0.5 + 4 / GROUP_SIZES[0]
    HAS_GROUPS = True

    def _quantize(self, weight: Tensor) -> StoredRows:
        groups = _in_groups(weight)
        smallest = groups.amin(-1)
        scale = ((groups.amax(-1) - smallest) / 15).clamp(min=MIN_SCALE).bfloat16()
        zero = (smallest + 8 * scale.float()).bfloat16()
        codes = ((groups - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).round_().add_(8).clamp_(0, 15)
        return {CODES: _pack_pairs(codes.to(torch.uint8).view(weight.shape)), SCALE: scale, ZERO: zero}

    def dequantize(self, stored: StoredRows) -> Tensor:
        codes = unpack_pairs(stored[CODES])
        groups = (codes.float() - 8).view(*stored[SCALE].shape, -1)
        return torch.addcmul(stored[ZERO].float()[..., None], groups, stored[SCALE].float()[..., None]).view(
            codes.shape
        )


class NF4Format(WeightFormat):
    """Quantiles of a normal distribution, times the largest of each group: codes [F, D / 2] uint8, scale [F, G]
    bfloat16."""

    NAME = "nf4"
    CODE_DTYPE = torch.uint8
    CODES_A_BYTE = 2
    SIDE_DTYPES: ClassVar = {SCALE: torch.bfloat16}
    BYTES_PER_WEIGHT = 0.5 + 2 / GROUP_SIZES[0]
    HAS_GROUPS = True

    def _quantize(self, weight: Tensor) -> StoredRows:
        groups = _in_groups(weight)
        scale = groups.abs().amax(-1).clamp(min=MIN_SCALE).bfloat16()
        values = torch.tensor(NF4_VALUES, device=weight.device)
        codes = torch.bucketize(groups / scale.float().unsqueeze(-1), (values[1:] + values[:-1]) / 2, out_int32=True)
        return {CODES: _pack_pairs(codes.to(torch.uint8).view(weight.shape)), SCALE: scale}

    def dequantize(self, stored: StoredRows) -> Tensor:
        codes = unpack_pairs(stored[CODES])
        values = torch.tensor(NF4_VALUES, device=codes.device)[codes.int()]
        return (values.view(*stored[SCALE].shape, -1) * stored[SCALE].float().unsqueeze(-1)).view(codes.shape)


WEIGHT_FORMATS: Mapping[str, WeightFormat] = {
    one.NAME: one for one in (Int8Format(), Int4Format(), Float8Format(), NF4Format())
}


def find_format(code_dtype: torch.dtype, suffixes: Collection[str]) -> WeightFormat | None:
    """The format of codes of this dtype beside which tensors with these suffixes stand; None where they are of none."""
    for one in (WEIGHT_FORMATS["int4"], *WEIGHT_FORMATS.values()):  # the one with most beside the codes first
        if one.CODE_DTYPE == code_dtype and all(suffix in suffixes for suffix in one.SIDE_DTYPES):
            return one
    return None


def group_size(n_inputs: int) -> int | None:
    """How many inputs share a scale where there are groups; None where no group divides them."""
    return next((size for size in GROUP_SIZES if n_inputs and n_inputs % size == 0), None)


def _in_groups(weight: Tensor) -> Tensor:
    """[F, D] -> [F, G, D / G]."""
    size = group_size(weight.shape[1])
    if size is None:
        raise ValueError(f"got a weight of {weight.shape[1]} inputs: expected a multiple of {GROUP_SIZES[-1]}")
    return weight.view(len(weight), -1, size)


def _pack_pairs(codes: Tensor) -> Tensor:
    """[F, D] from 0 to 15 -> [F, D / 2], the first of two in the high bits."""
    return (codes[:, ::2] << 4) | codes[:, 1::2]


def unpack_pairs(packed: Tensor) -> Tensor:
    """[F, D / 2] -> [F, D] from 0 to 15."""
    return torch.stack((packed >> 4, packed & 15), -1).flatten(1)
