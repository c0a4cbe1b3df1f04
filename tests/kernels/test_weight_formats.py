"""Weights in few bits: as exact as they can be, rounded the same twice, and as torchao rounds them."""

import pytest
import torch

from unimm.kernels.weight_formats import CODES, SCALE, WEIGHT_FORMATS, ZERO, find_format, group_size

each_format = pytest.mark.parametrize("name", WEIGHT_FORMATS)


def weight(rows: int = 48, width: int = 192) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, width) * torch.logspace(-4, 2, rows)[:, None]


# of normal numbers: half a step of 1/127 of the largest, uniform; 2^-4 of a mantissa of 3 bits, uniform on its step;
# half a step of 1/15 of the range of 64; the 16 quantiles, as the paper's own table has them
@pytest.mark.parametrize(("name", "error"), [("int8", 0.008), ("fp8", 0.028), ("int4", 0.095), ("nf4", 0.098)])
def test_errors(name, error):
    w, one = weight(), WEIGHT_FORMATS[name]
    got = one.dequantize(one.quantize(w))
    by_row = (got - w).norm(dim=1) / w.norm(dim=1)
    assert error / 2 < by_row.mean() < error and by_row.max() < 1.3 * error


@each_format
def test_rounding_twice_changes_nothing(name):
    one = WEIGHT_FORMATS[name]
    stored = one.quantize(weight())
    again = one.quantize(one.dequantize(stored))
    assert torch.equal(again[CODES], stored[CODES])
    for suffix in one.SIDE_DTYPES:
        torch.testing.assert_close(again[suffix], stored[suffix], rtol=1e-6, atol=0)


@each_format
def test_layout(name):
    w, one = weight(), WEIGHT_FORMATS[name]
    stored = one.quantize(w.bfloat16())
    assert all(len(part) == len(w) for part in stored.values()), "rows can be split and joined"
    assert one.shape(stored[CODES].shape) == w.shape and stored[CODES].dtype == one.CODE_DTYPE
    assert {suffix: stored[suffix].dtype for suffix in one.SIDE_DTYPES} == one.SIDE_DTYPES
    assert all(one.side_shape_fits(stored[CODES].shape, stored[suffix].shape) for suffix in one.SIDE_DTYPES)
    assert not one.side_shape_fits(stored[CODES].shape, (len(w) - 1, 3)) and not one.side_shape_fits((4,), (4,))
    assert find_format(one.CODE_DTYPE, one.SIDE_DTYPES) is one
    assert find_format(one.CODE_DTYPE, ()) is None
    n_bytes = sum(part.nbytes for part in stored.values()) - (4 * len(w) if not one.HAS_GROUPS else 0)
    assert n_bytes == one.BYTES_PER_WEIGHT * w.numel()


@each_format
def test_rows_in_chunks(name, monkeypatch):
    one = WEIGHT_FORMATS[name]
    whole = one.quantize(weight())
    monkeypatch.setattr("unimm.kernels.weight_formats.CHUNK_ELEMENTS", 1000)
    parts = one.quantize(weight())
    assert all(torch.equal(parts[suffix].float(), whole[suffix].float()) for suffix in whole)


@each_format
def test_nothing_but_zeros(name):
    one = WEIGHT_FORMATS[name]
    assert not one.dequantize(one.quantize(torch.zeros(2, 64))).any()


def test_widths():
    assert [group_size(n) for n in (128, 64, 96, 120, 0)] == [64, 64, 32, None, None]
    assert WEIGHT_FORMATS["int8"].fits(120) and not WEIGHT_FORMATS["nf4"].fits(120)
    with pytest.raises(ValueError, match="got a weight of 120 inputs: expected a multiple of 32"):
        WEIGHT_FORMATS["int4"].quantize(torch.zeros(2, 120))


# torchao's scale of int8 is the largest over 127.5, so that codes are up to one apart
@pytest.mark.parametrize(
    ("name", "config", "scale_off", "code_off"),
    [("int8", "Int8WeightOnlyConfig", 1 / 255, 1.0), ("fp8", "Float8WeightOnlyConfig", 1e-6, 0.0)],
)
def test_torchao_rounds_the_same(name, config, scale_off, code_off):
    quantization = pytest.importorskip("torchao.quantization")
    w, one = weight(), WEIGHT_FORMATS[name]
    linear = torch.nn.Linear(*w.shape[::-1], bias=False)
    linear.weight.data = w.clone()
    quantization.quantize_(linear, getattr(quantization, config)(version=2))
    stored = one.quantize(w)
    theirs = linear.weight
    torch.testing.assert_close(theirs.scale.flatten(), stored[SCALE], rtol=1.01 * scale_off, atol=0)
    assert (theirs.qdata.float() - stored[CODES].float()).abs().max() <= code_off


def test_torchao_rounds_int4_the_same():
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    w, one = weight().bfloat16(), WEIGHT_FORMATS["int4"]
    kind = primitives.MappingType.ASYMMETRIC
    numbers = dict(quant_min=0, quant_max=15)
    scale, zero = primitives._choose_qparams_affine_tinygemm(
        *(w, kind, (1, 64), torch.int32), **numbers, scale_dtype=torch.bfloat16, zero_point_dtype=torch.bfloat16
    )
    stored = one.quantize(w)
    shape = stored[SCALE].shape
    # sums in bfloat16 there, in float32 here
    torch.testing.assert_close(scale.view(shape), stored[SCALE], rtol=2**-6, atol=0)
    largest = w.view(*shape, -1).abs().amax(-1).float()
    assert ((zero.view(shape).float() - stored[ZERO].float()).abs() < 2**-6 * largest).all()
