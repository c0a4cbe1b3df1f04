"""Weights in few bits in files: codes under the released name, and scales beside them, under that name and a suffix."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from unimm.checkpoint.contents import CheckpointError
from unimm.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES, TensorHeader
from unimm.kernels.weight_formats import CODES, SCALE, ZERO, StoredRows, WeightFormat, find_format


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight of a file that is in few bits. sides: what stands beside its codes, by suffixes."""

    format: WeightFormat
    sides: Mapping[str, Tensor]

    def with_codes(self, codes: Tensor) -> StoredRows:
        """All that is stored of it."""
        return {CODES: codes, **self.sides}


def quantized_formats(headers: Mapping[str, TensorHeader], where: str) -> dict[str, WeightFormat]:
    """The format of each tensor that is in few bits, by its name.

    Raises CheckpointError where what stands beside a tensor's codes is not what its format has.
    """
    formats: dict[str, WeightFormat] = {}
    for key, header in headers.items():
        dtype = DTYPES.get(header.dtype)
        beside = [suffix for suffix in (SCALE, ZERO) if key + suffix in headers]
        found = find_format(dtype, beside) if dtype is not None and beside else None
        if found is not None:
            _check_sides(key, headers, found, where)
            formats[key] = found
    return formats


def _check_sides(key: str, headers: Mapping[str, TensorHeader], format_: WeightFormat, where: str) -> None:
    codes = headers[key]
    for suffix, dtype in format_.SIDE_DTYPES.items():
        side = headers[key + suffix]
        if side.dtype != DTYPE_NAMES[dtype] or not format_.side_shape_fits(codes.shape, side.shape):
            numbers = "numbers, one for each group of inputs," if format_.HAS_GROUPS else "a number"
            raise CheckpointError(
                f"{where} holds {key + suffix} of shape {list(side.shape)} in {side.dtype} for {key} of shape "
                f"{list(codes.shape)} in {codes.dtype}: expected {numbers} in {DTYPE_NAMES[dtype]} for each row of a "
                "matrix; fetch it again"
            )


def side_names(formats: Mapping[str, WeightFormat]) -> dict[str, tuple[str, str]]:
    """The names of the tensors beside codes, and of which tensor, by which suffix."""
    return {key + suffix: (key, suffix) for key, one in formats.items() for suffix in one.SIDE_DTYPES}


def whole_headers(headers: Mapping[str, TensorHeader], formats: Mapping[str, WeightFormat]) -> dict[str, TensorHeader]:
    """The headers without what stands beside codes, and with the shapes of the weights in place of the codes'."""
    beside = side_names(formats)
    return {
        key: TensorHeader(formats[key].shape(header.shape), header.dtype) if key in formats else header
        for key, header in headers.items()
        if key not in beside
    }
