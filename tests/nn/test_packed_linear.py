"""Few rows on a CPU: packed weights equal the plain product, decoding gathers nothing, and the rivals choose the same
codes."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.paths import ROOT

from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.kernels import AttentionMask, KeyRange, attention, use_kernels
from unimm.nn.packed_linear import (
    MIN_PACKED_WEIGHTS,
    PackedFloat16,
    SplitFloat16,
    pack_weight,
    packed_linear,
)
from unimm.nn.quantized_linear import can_pack

packs = pytest.mark.skipif(not can_pack(), reason="PyTorch has packed products on x86 alone")
OUT, IN = 576, 600  # no multiples of what a product takes at once


def weights(dtype: torch.dtype, *, bias: bool = True, std: float = 0.04):
    torch.manual_seed(0)
    return (torch.randn(OUT, IN) * std).to(dtype), torch.randn(OUT).to(dtype) if bias else None


def error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return float((y.double() - truth).norm() / truth.norm())


@packs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
def test_packed_weights_lose_nothing(rows, bias):
    x = torch.randn(rows, IN)
    for kind, dtype in ((PackedFloat16, torch.bfloat16), (PackedFloat16, torch.float16), (SplitFloat16, torch.float32)):
        w, b = weights(dtype, bias=bias)
        # x in float32, so that nothing is rounded but the sums: 600 of them, 6e-8 each, in any order
        assert error(kind(w, b)(x), x, w, b) < 2e-6
    assert error(PackedFloat16(w, b)(x), x, w, b) > 1e-5  # half of a pair is not enough, and this test sees it


@packs
def test_a_pair_is_off_by_a_last_bit_at_most():
    w, _ = weights(torch.float32)
    assert (
        SplitFloat16.rounding_error(w).abs() <= 2.0**-23 * w.abs().clamp(min=2.0**-12)
    ).all()  # near 0 float16's own steps end
    assert SplitFloat16.rounding_error(w).norm() < 2.0**-24 * w.norm()
    w, _ = weights(torch.bfloat16)
    assert PackedFloat16.rounding_error(w).abs().max() < 2.0**-24


@packs
def test_results_have_the_dtype_and_shape_of_x():
    w, b = weights(torch.bfloat16)
    x = torch.randn(1, 2, IN).bfloat16()
    with torch.no_grad():
        y = packed_linear(x, w, b, pack_weight(w, b))
    assert y.dtype == torch.bfloat16 and y.shape == (1, 2, OUT)
    assert error(y[0], x[0], w, b) < 2.0**-8  # a rounding to bfloat16


@pytest.fixture(autouse=True)
def without_tiles(monkeypatch):
    """What is packed is tested as on a CPU without tiles, whatever this one has."""
    monkeypatch.setattr("unimm.nn.packed_linear.prefers_bfloat16", lambda device: False)


@packs
def test_where_a_cpu_has_tiles(monkeypatch):
    monkeypatch.setattr("unimm.nn.packed_linear.prefers_bfloat16", lambda device: device.type == "cpu")
    assert pack_weight(*weights(torch.bfloat16)) is None and pack_weight(*weights(torch.float16)) is None
    assert isinstance(pack_weight(*weights(torch.float32)), SplitFloat16)


@packs
def test_what_is_not_packed():
    assert isinstance(pack_weight(*weights(torch.float32)), SplitFloat16)
    assert isinstance(pack_weight(*weights(torch.bfloat16)), PackedFloat16)
    assert pack_weight(*weights(torch.float64)) is None
    assert pack_weight(*weights(torch.float32, std=1e6)) is None  # infinite in float16
    assert pack_weight(*weights(torch.bfloat16, std=1e6)) is None
    assert pack_weight(*weights(torch.bfloat16, std=1e-6)) is None  # below what float16 tells apart
    assert pack_weight(torch.randn(MIN_PACKED_WEIGHTS // 8, 4), None) is None
    assert pack_weight(torch.randn(OUT, IN, device="meta"), None) is None


@packs
def test_gradients_and_many_rows_take_the_plain_way():
    w, b = weights(torch.float32)
    packed, x = pack_weight(w, b), torch.randn(2, IN, requires_grad=True)
    assert torch.equal(packed_linear(x, w, b, packed), F.linear(x, w, b))
    (grad,) = torch.autograd.grad(packed_linear(x, w, b, packed).sum(), x)
    torch.testing.assert_close(grad, w.sum(0).expand(2, -1))
    with torch.no_grad():
        many = torch.randn(SplitFloat16.MAX_ROWS + 1, IN)
        assert torch.equal(packed_linear(many, w, b, packed), F.linear(many, w, b))
        assert not torch.equal(packed_linear(many[:2], w, b, packed), F.linear(many[:2], w, b))


def test_decoding_samples_of_one_length_gathers_nothing():
    torch.manual_seed(0)
    k, v = torch.randn(2, 40, 2, 8)
    q = torch.randn(3, 4, 8, requires_grad=True)
    even = AttentionMask([[KeyRange(9)]] * 3, query_lengths=[1] * 3, key_starts=[2, 14, 26])
    assert even.uniform_decode == (2, 12, 9)
    y = attention(q, k, v, even)
    with use_kernels("reference"):
        truth = attention(q, k, v, even)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), q)[0] for t in (y, truth)))
    alone = AttentionMask([[KeyRange(3, full=True), KeyRange(2)]], query_lengths=[1], key_starts=[4])
    together = AttentionMask([[KeyRange(5)]] * 3, query_lengths=[1] * 3, key_starts=[4, 9, 14])
    torch.testing.assert_close(attention(q[:1], k, v, alone)[0], attention(q, k, v, together)[0])
    for samples, starts in (
        ([[KeyRange(9)], [KeyRange(8)]], [0, 9]),  # lengths differ
        ([[KeyRange(9)]] * 3, [0, 9, 20]),  # steps differ
        ([[KeyRange(9)]] * 2, [9, 0]),
        ([[KeyRange(4, visible=False), KeyRange(5)]] * 2, [0, 9]),  # not all is seen
    ):
        assert AttentionMask(samples, query_lengths=[1] * len(samples), key_starts=starts).uniform_decode is None
    assert AttentionMask([[KeyRange(9)]] * 2).uniform_decode is None


@pytest.fixture(scope="module")
def bench():
    """The script of the timings, which is no part of the package."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("janus_decode")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def model(bench):
    return bench.build("toy", 2, torch.float32, "cpu")


def test_the_rivals_choose_the_same_codes(bench, model, tmp_path):
    ids = [1, *range(10, 20), 4]
    codes = bench.ours(model)(ids, 2, 12)
    assert torch.equal(bench.ours(model.optimize_for_cpu())(ids, 2, 12), codes)
    assert torch.equal(bench.captured(model)[0](ids, 2, 12), codes)
    model.save_pretrained(tmp_path, layout="transformers")
    theirs, _ = bench.transformers(tmp_path, torch.float32, "cpu")
    assert torch.equal(theirs(ids, 2, 12), codes)
    assert len(set(codes[0].tolist())) > 6  # a loop that feeds nothing back would repeat itself


@packs
def test_a_prepared_model_is_the_same_model(bench, model, tmp_path):
    before = {name: type(part) for name, part in model.named_modules()}
    ready = model.optimize_for_cpu()
    assert {name: type(part) for name, part in model.named_modules()} == before
    assert all(ours is theirs for ours, theirs in zip(ready.parameters(), model.parameters(), strict=True))
    kinds = {name: type(part).__name__ for name, part in ready.named_modules() if "Linear" in type(part).__name__}
    assert kinds["decoder.blocks.0.experts.all.q"] == kinds["gen_head.fc2"] == "PackedLinear"
    assert not [name for name, kind in kinds.items() if kind != "Linear" and name.startswith("vision")]
    ready.save_pretrained(tmp_path)
    assert bench.Janus.from_pretrained(tmp_path).state_dict().keys() == model.state_dict().keys()


@packs
def test_an_int8_model(bench, model, tmp_path):
    small = model.optimize_for_cpu(int8=True)
    kept = sum(p.numel() for p in small.decoder.blocks.parameters())
    assert kept == sum(p.numel() for name, p in model.decoder.blocks.named_parameters() if "norm" in name)
    x, logits = torch.randn(2, 512), []
    for one in (model, small):
        with torch.inference_mode():
            logits.append(one.image_logits(one.decode_session([EMPTY_CACHE, EMPTY_CACHE], 1).append(x)))
    # 14 products of about 1 % each, in two layers that add to the stream
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.05
    with pytest.raises(ValueError, match="is in int8 and has no parameter for it"):
        small.state_dict()
    small.save_pretrained(tmp_path / "a")
    again = bench.Janus.from_pretrained(tmp_path / "a", quantize="int8")
    with torch.inference_mode():
        got = again.image_logits(again.decode_session([EMPTY_CACHE, EMPTY_CACHE], 1).append(x))
    torch.testing.assert_close(got, logits[1], rtol=1e-4, atol=1e-4)


def test_int8_needs_the_products(model, monkeypatch):
    monkeypatch.setattr("unimm.nn.quantized_linear.can_pack", lambda: False)
    with pytest.raises(ValueError, match="int8 needs PyTorch's x86 engine"):
        model.optimize_for_cpu(int8=True)


def test_the_cache_of_decoding_is_wide_on_a_cpu(bench):
    half = bench.build("toy", 1, torch.bfloat16, "cpu")
    session = half.decode_session([EMPTY_CACHE, EMPTY_CACHE], 3)
    assert session.buffer.buffer.dtype == torch.float32
    with torch.inference_mode():
        assert session.append(torch.randn(2, 512).bfloat16()).dtype == torch.bfloat16
