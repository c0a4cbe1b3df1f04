"""Linears in int8: loaded so, in every family, the same as rounding the loaded model; what stays, and what is refused."""

import pytest
import torch
from torch import nn

import unimm
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.models.registry import FAMILIES
from unimm.nn.packed_linear import Int8Linear, can_pack
from unimm.sequence.parts import text_part

pytestmark = pytest.mark.skipif(not can_pack(), reason="this CPU, or PyTorch, has no products of int8")
each_family = pytest.mark.parametrize("family", FAMILIES)


def reader(model):
    """The causal language model of a family."""
    return getattr(model, "mllm", model)


def cached_values(model, ids) -> torch.Tensor:
    """The last layer's values after a text."""
    (cache,) = reader(model).prefill([EMPTY_CACHE], [[text_part(ids)]])
    return cache.chunks[0][-1, 1]


@each_family
def test_a_family_in_int8(family, tmp_path):
    name = f"{family.lower()}-nano"
    whole, small = unimm.load(name), unimm.load(name, quantize="int8")
    rounded = whole.optimize_for_cpu(int8=True)
    kinds = {path: type(part) for path, part in small.named_modules() if isinstance(part, nn.Linear | Int8Linear)}
    for path, kind in kinds.items():
        assert (kind is Int8Linear) == path.startswith(tuple(f"{part}." for part in whole.QUANTIZED)), path
    assert all(any(path.startswith(part) for path in kinds) for part in whole.QUANTIZED)
    kept = dict(small.named_parameters())
    assert all(torch.equal(p, whole.get_parameter(path)) for path, p in kept.items())
    assert sum(p.numel() for p in kept.values()) < sum(p.numel() for p in whole.parameters())
    ids = list(range(5, 15))
    ours, theirs, truth = (cached_values(model, ids) for model in (small, rounded, whole))
    assert torch.equal(ours, theirs), "rounded while it was loaded, or after"
    # about 1 % a product, seven in each of up to six layers that add to the stream
    assert 0 < float((ours - truth).norm() / truth.norm()) < 0.1
    small.save_pretrained(tmp_path)
    again, floats = unimm.load(tmp_path, quantize="int8"), unimm.load(tmp_path)
    products = [(part, again.get_submodule(path)) for path, part in small.named_modules() if type(part) is Int8Linear]
    for part, other in products:  # the same bytes, and scales but for the last bit
        (weight, scale), (found, found_scale) = part.int8_weight(), other.int8_weight()
        assert torch.equal(weight, found)
        torch.testing.assert_close(found_scale, scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(cached_values(again, ids), ours, rtol=1e-4, atol=1e-4)
    path, part = next((path, part) for path, part in small.named_modules() if type(part) is Int8Linear)
    weight, scale = part.int8_weight()
    assert torch.equal(floats.get_submodule(path).weight, weight * scale[:, None]), "multiplied out"


@pytest.mark.parametrize("family", ["Bagel", "MetaQuery", "UniWorld"])
def test_images_in_int8(family):
    """The nano families that denoise: the whole way through their blocks."""
    models = [unimm.load(f"{family.lower()}-nano", quantize=quantize) for quantize in (None, "int8")]
    one, other = (
        torch.tensor(list(model.generate("a red circle", steps=3).image.convert("RGB").tobytes())).float()
        for model in models
    )
    assert 0 < (one - other).abs().mean() < 10  # of 255


@pytest.mark.parametrize("quantize", ["int4", "", True, 8])
def test_other_ways_are_refused(quantize):
    with pytest.raises(ValueError, match="expected 'int8', or None"):
        unimm.load("janus-nano", quantize=quantize)


def test_what_int8_needs(monkeypatch):
    with pytest.raises(ValueError, match="got quantize 'int8' and offload \"disk\""):
        unimm.load("janus-nano", quantize="int8", offload="disk")
    monkeypatch.setattr("unimm.nn.packed_linear.can_pack", lambda: False)
    with pytest.raises(ValueError, match="int8 needs PyTorch's x86 engine"):
        unimm.load("janus-nano", quantize="int8")
