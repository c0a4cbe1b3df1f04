"""Products with weights in few bits equal those with the weights that they stand for, and give back what is stored."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unimm.kernels.weight_formats import CODES, SCALE, WEIGHT_FORMATS
from unimm.nn.quantized_linear import (
    DynamicFloat8,
    MultipliedOut,
    PackedInt4,
    PackedInt8,
    QuantizedLinear,
    ScaledCodes,
    can_pack,
    quantized_product,
)

packs = pytest.mark.skipif(not can_pack(), reason="PyTorch has packed products on x86 alone")
each_format = pytest.mark.parametrize(
    "name", [pytest.param(one, marks=packs if one == "int8" else ()) for one in WEIGHT_FORMATS]
)
OUT, IN = 104, 192  # outputs: a block of 64, and rows that are no multiple of 16


def linear(out: int = OUT, width: int = IN) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out)


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    return float((y.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm())


@each_format
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(name, shape, dtype):
    whole = linear().to(dtype)
    small = QuantizedLinear.of(whole, name)
    weight = small.format.dequantize({suffix: small.stored_part(suffix) for suffix in small.stored_layout()})
    x = torch.randn(*shape, IN).to(dtype)
    y = small(x)
    assert y.dtype == dtype and y.shape == (*shape, OUT)
    truth = F.linear(x.float(), weight, whole.bias.float())
    # int8 rounds x to 8 bits, or 7: 3.5 / 63 / sqrt(12); int4 multiplies in bfloat16; results are rounded to the dtype
    bound = {"int8": 0.02, "int4": 0.003}.get(name, 2e-6 if dtype == torch.float32 else 2.0**-8)
    assert error(y, truth) < bound + (2.0**-8 if dtype == torch.bfloat16 else 0)


@packs
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_int8_on_a_cpu(rows):
    whole = linear()
    x, product = torch.randn(rows, IN) * torch.logspace(-3, 3, rows)[:, None], QuantizedLinear.of(whole, "int8").product
    assert isinstance(product, PackedInt8)
    y = product(x)
    for i in range(rows):  # each with its own scale, and sums that are exact
        assert torch.equal(product(x[i : i + 1])[0], y[i])
    # an error of half a step of 1/127 of the largest, uniform, of either factor: 3.5 / 127 / sqrt(12) = 0.8 % for
    # normal numbers, so 1.1 % in all, and twice that of x where it has 7 bits
    assert error(y, x @ whole.weight.T) < 0.025
    assert not product(torch.zeros(1, IN)).any()


@each_format
@pytest.mark.parametrize(("out", "width"), [(OUT, IN), (16, 96), (128, 64), (3, 32)])
def test_what_is_stored_comes_back(name, out, width):
    one = WEIGHT_FORMATS[name]
    stored = one.quantize(linear(out, width).weight)
    product = quantized_product(one, stored)
    for suffix, part in stored.items():
        got = product.stored_part(suffix)
        assert got.dtype == part.dtype and torch.equal(got.view(torch.uint8), part.view(torch.uint8)), suffix
        assert product.layout[suffix].shape == part.shape and product.layout[suffix].is_meta


def test_int4_is_packed_in_parts(monkeypatch):
    stored = WEIGHT_FORMATS["int4"].quantize(linear(256, 64).weight)
    whole = PackedInt4(stored)
    monkeypatch.setattr(PackedInt4, "PACKED_AT_ONCE", 64 * 64)
    parts = PackedInt4(stored)
    assert torch.equal(parts.packed, whole.packed)
    monkeypatch.undo()
    assert torch.equal(parts.stored_part(CODES), stored[CODES])


def test_float8_of_both_factors():
    """The way of a GPU; a CPU has the same product, slowly."""
    one = WEIGHT_FORMATS["fp8"]
    whole = linear(96)
    stored = one.quantize(whole.weight)
    x = torch.randn(2, 5, IN) * torch.logspace(-3, 3, 5)[:, None]
    y = DynamicFloat8(stored)(x)
    assert y.shape == (2, 5, 96) and y.dtype == torch.float32
    codes = one.quantize(x.view(-1, IN))
    truth = F.linear(one.dequantize(codes), one.dequantize(stored)).view(y.shape)
    assert error(y, truth) < 2.0**-8, "a rounding to bfloat16"
    assert error(y, x @ whole.weight.T) < 0.045
    assert not DynamicFloat8(stored)(torch.zeros(1, IN)).any()


def test_where_there_is_no_product():
    weight, x = linear().weight, torch.randn(3, IN)
    for name, kind in {"int8": ScaledCodes, "fp8": ScaledCodes, "int4": MultipliedOut, "nf4": MultipliedOut}.items():
        one = WEIGHT_FORMATS[name]
        stored = one.quantize(weight)
        assert error(kind(one, stored)(x), x @ one.dequantize(stored).T) < 2e-6
    meta = {suffix: part.to("meta") for suffix, part in WEIGHT_FORMATS["int4"].quantize(weight).items()}
    assert isinstance(quantized_product(WEIGHT_FORMATS["int4"], meta), MultipliedOut)


@each_format
def test_a_module(name):
    small = QuantizedLinear.of(linear(), name)
    assert [key for key, _ in small.named_parameters()] == ["bias"]
    x = torch.randn(2, IN)
    y = small(x)
    assert torch.equal(copy.deepcopy(small)(x), y)
    scale = small.stored_part(SCALE)
    small.to(torch.float64)  # the scales are not the module's dtype
    assert torch.equal(small.stored_part(SCALE), scale) and small.bias.dtype == torch.float64
    assert small.qweight.device == small.product.device == torch.device("cpu")
    with pytest.raises(ValueError, match=f"is in {name} and has no parameter for it: save the model"):
        small.state_dict()
    assert f"format={name}" in repr(small)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@pytest.mark.parametrize("rows", [1, 17, 256])
def test_on_a_gpu(name, rows):
    """Each format's product there, against what is stored; and back to the CPU without a loss."""
    one, whole = WEIGHT_FORMATS[name], linear(256, 512).cuda().bfloat16()
    small = QuantizedLinear.of(whole, name)
    stored = {suffix: small.stored_part(suffix) for suffix in small.stored_layout()}
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    truth = F.linear(x.float(), one.dequantize(stored), whole.bias.float())
    assert error(small(x), truth) < (0.04 if name == "fp8" else 0.006)
    expected = one.quantize(whole.weight.cpu())
    assert (stored[SCALE].cpu().float() / expected[SCALE].float() - 1).abs().max() < 1e-2
    back = small.cpu()
    for suffix, part in stored.items():
        assert torch.equal(back.stored_part(suffix).view(torch.uint8), part.cpu().view(torch.uint8))
