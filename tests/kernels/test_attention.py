"""Every way of computing attention, and its gradients, against the plain one."""

import re
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unimm.kernels import AttentionMask, KeyRange, attention, get_backend, use_kernels
from unimm.kernels.attention.attention import (
    _attention_by_chunk,
    _attention_by_range,
    _attention_padded,
    _attention_via_op,
    attention_reference,
)
from unimm.kernels.dispatch import resolve_backend, unsupported_reason

blocks = st.lists(
    st.builds(KeyRange, st.integers(0, 5), full=st.booleans(), visible=st.booleans()), min_size=1, max_size=6
)
N_HEADS, N_GROUPS, HEAD = 4, 2, 8


def op(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    return _attention_via_op(q, k, v, mask, "sdpa")


def inputs(
    mask: AttentionMask, *, extra: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False
) -> list[Tensor]:
    """q, k and v for a mask; `extra` rows of keys behind what it describes."""
    sizes = ((mask.n_queries, N_HEADS), (mask.n_keys + extra, N_GROUPS), (mask.n_keys + extra, N_GROUPS))
    return [torch.randn(*size, HEAD, dtype=dtype).requires_grad_(grad) for size in sizes]


def packs() -> dict[str, AttentionMask]:
    """Masks of every shape that the ways tell apart."""
    first = [KeyRange(3), KeyRange(4, full=True), KeyRange(3, full=True, visible=False), KeyRange(2)]
    keys = torch.arange(30)
    window = (keys, (keys + 7).clamp(max=28))  # row 0 attends to key 0, no row to the last two keys
    blind = (torch.full((9,), 4), torch.full((9,), 7))  # rows 0 to 3 and 7 see nothing
    return {
        "one": AttentionMask([first]),
        "many": AttentionMask([first, [KeyRange(40), KeyRange(3, full=True)]]),
        "cached": AttentionMask(
            [first, [KeyRange(9), KeyRange(3, full=True)]], query_lengths=[2, 3], key_starts=[2, 20]
        ),
        "empty": AttentionMask(
            [[KeyRange(3)], [], [KeyRange(2, full=True)], [KeyRange(4)]], query_lengths=[3, 0, 2, 0]
        ),
        "ahead": AttentionMask([[KeyRange(3), KeyRange(4, full=True, seen_before=True), KeyRange(2)]]),
        "window": AttentionMask.from_ranges(window[0].clamp(max=28), window[1], n_queries=28),
        "blind": AttentionMask.from_ranges(*blind, n_queries=8),
        "two": AttentionMask.from_ranges(
            torch.zeros(6), torch.full((6,), 2), (torch.arange(6) + 2, torch.full((6,), 9)), n_queries=9
        ),
    }


def ways(mask: AttentionMask) -> list:
    if not mask.samples:
        return [_attention_by_chunk, op]
    return [_attention_padded, _attention_by_chunk if mask.sees_ahead else _attention_by_range, op]


@given(st.lists(blocks, min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_every_way_gives_the_same(samples, data):
    samples = [[*sample, KeyRange(2, full=data.draw(st.booleans()))] for sample in samples]
    totals = [sum(b.length for b in sample) for sample in samples]
    queries = [data.draw(st.integers(1, n)) for n in totals]
    gaps = [data.draw(st.integers(0, 3)) for _ in totals]
    starts = [sum(totals[:i]) + sum(gaps[: i + 1]) for i in range(len(totals))]
    mask = AttentionMask(samples, query_lengths=queries, key_starts=starts)
    q, k, v = inputs(mask)
    expected = attention_reference(q, k, v, mask)
    for way in ways(mask):
        torch.testing.assert_close(way(q, k, v, mask), expected)


@pytest.mark.parametrize("name", packs())
@pytest.mark.parametrize("rows", [512, 5])
def test_gradients_of_every_way(name, rows, monkeypatch):
    monkeypatch.setattr(import_module("unimm.kernels.attention.mask"), "MAX_CALL_ROWS", rows)
    mask = packs()[name]
    mask.use_padding &= rows == 512
    x = inputs(mask, grad=True)
    towards = torch.randn(mask.n_queries, N_HEADS, HEAD, dtype=torch.float64)
    truth_y = attention_reference(*x, mask)
    truth = torch.autograd.grad(truth_y, x, towards)
    for way in ways(mask):
        y = way(*x, mask)
        torch.testing.assert_close(y, truth_y)
        torch.testing.assert_close(torch.autograd.grad(y, x, towards), truth)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_rounding_is_that_of_the_dtype(dtype, bound):
    """Values and gradients in a narrow dtype against float64, as a norm."""
    mask = packs()["many"]
    exact = inputs(mask, dtype=dtype)
    towards = torch.randn(mask.n_queries, N_HEADS, HEAD, dtype=dtype)
    wide = [t.double().requires_grad_() for t in exact]
    y = attention_reference(*wide, mask)
    truth = (y, *torch.autograd.grad(y, wide, towards.double()))
    for way in ways(mask):
        narrow = [t.clone().requires_grad_() for t in exact]
        y = way(*narrow, mask)
        for a, b in zip((y, *torch.autograd.grad(y, narrow, towards)), truth, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= bound * b.norm()


@given(st.data(), st.sampled_from([(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]))
@settings(max_examples=40, deadline=None)
def test_a_sample_does_not_round_as_its_neighbours_do(data, how):
    """Equal to the bit alone and in a batch: in half precision, and where it is asked for."""
    dtype, by_sample = how
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=2, max_size=5))
    decodes = data.draw(st.booleans())
    samples = [[KeyRange(n), KeyRange(data.draw(st.integers(0, 4)), full=True)] for n in lengths]
    totals = [sum(b.length for b in sample) for sample in samples]
    queries = [1] * len(totals) if decodes else totals
    mask = AttentionMask(samples, query_lengths=queries)
    q, k, v = (
        torch.randn(n, heads, 64).to(dtype)
        for n, heads in zip((mask.n_queries, mask.n_keys, mask.n_keys), (4, 2, 2), strict=True)
    )
    together = attention(q, k, v, mask, by_sample=by_sample).split(queries)
    rows = zip(q.split(queries), k.split(totals), v.split(totals), strict=True)
    for sample, n, row, y in zip(samples, queries, rows, together, strict=True):
        assert torch.equal(attention(*row, AttentionMask([sample], query_lengths=[n]), by_sample=by_sample), y)


@pytest.mark.parametrize("kernels", ["auto", "reference", "flex"])
def test_rows_that_see_nothing_give_zero(kernels):
    mask = packs()["blind"]
    q, k, v = inputs(mask, dtype=torch.float32)
    with use_kernels(kernels), torch.no_grad():
        y = attention(q, k, v, mask)
    blind = ~mask.dense().any(1)
    assert blind.tolist() == [True] * 4 + [False] * 3 + [True]
    assert (y[blind] == 0).all() and torch.isfinite(y).all() and (y[~blind] != 0).all()
    o, lse = torch.ops.unimm.attention(q, k, v, mask.ranges, mask.table, [], [], "sdpa")
    assert (o[blind] == 0).all() and (lse[:, blind] == float("-inf")).all() and torch.isfinite(lse[:, ~blind]).all()


def test_the_logarithm_of_the_sum():
    mask = packs()["many"]
    q, k, v = inputs(mask)
    scores = torch.einsum("nhk, mhk -> hnm", q, k.repeat_interleave(2, 1)) * HEAD**-0.5
    expected = scores.masked_fill(~mask.dense(), float("-inf")).logsumexp(-1)
    torch.testing.assert_close(torch.ops.unimm.attention(q, k, v, mask.ranges, mask.table, [], [], "sdpa")[1], expected)


@pytest.mark.parametrize("name", ["one", "many", "cached", "window", "two"])
def test_flex_gives_the_same(name):
    mask = packs()[name]
    q, k, v = inputs(mask, dtype=torch.float32)
    with use_kernels("flex"):
        torch.testing.assert_close(attention(q, k, v, mask), attention_reference(q, k, v, mask))


def test_long_samples_are_not_padded(monkeypatch):
    monkeypatch.setattr(import_module("unimm.kernels.attention.mask"), "MAX_PADDED_ROWS", 4)
    mask = AttentionMask([[KeyRange(6, full=True)], [KeyRange(5)]])
    assert not mask.use_padding
    q, k, v = inputs(mask)
    torch.testing.assert_close(attention(q, k, v, mask), attention_reference(q, k, v, mask))


@pytest.mark.parametrize("kernels", ["auto", "reference", "flex"])
def test_keys_may_go_on_behind_the_mask(kernels):
    mask = packs()["many"]
    q, k, v = inputs(mask, extra=3, dtype=torch.float32)
    with use_kernels(kernels):
        torch.testing.assert_close(attention(q, k, v, mask), attention_reference(q, k[:-3], v[:-3], mask))


def test_unwritten_rows_do_not_leak():
    mask = AttentionMask([[KeyRange(2)], [KeyRange(5)]], key_starts=[0, 4])
    q, k, v = inputs(mask, extra=1)
    expected = attention_reference(q, k, v, mask)
    for t in (k, v):
        t[2:4], t[9:] = float("nan"), float("nan")
    for way in (attention, *ways(mask)):
        torch.testing.assert_close(way(q, k, v, mask), expected)


def test_autocast_reaches_every_backend():
    mask = packs()["many"]
    q, k, v = inputs(mask, dtype=torch.float32)
    for kernels in ("auto", "reference", "flex"):
        with use_kernels(kernels), torch.autocast("cpu", torch.bfloat16):
            assert attention(q, k, v, mask).dtype == torch.bfloat16


def test_backend_is_chosen_and_refused(monkeypatch):
    mask = AttentionMask([[KeyRange(3)]])
    q, k, v = torch.randn(3, 3, 2, 4)
    with use_kernels("reference"):
        assert get_backend() == "reference"
        torch.testing.assert_close(attention(q, k, v, mask), attention_reference(q, k, v, mask), rtol=0, atol=0)
    monkeypatch.setenv("UNIMM_KERNELS", "fast")
    with pytest.raises(ValueError, match="unknown kernel backend 'fast'.*reference"):
        attention(q, k, v, mask)


def test_what_cannot_be_met_is_an_error(monkeypatch):
    dispatch = import_module("unimm.kernels.dispatch")
    monkeypatch.setattr(dispatch, "interpreter_enabled", lambda: False)
    x = torch.randn(3, 2, 8)
    assert resolve_backend("attention", x) == "sdpa"
    with use_kernels("triton"), pytest.raises(ValueError, match="backend 'triton' was asked for, but got cpu tensors"):
        resolve_backend("attention", x)
    with use_kernels("triton"), pytest.raises(ValueError, match=re.escape("got torch.float64: cast")):
        resolve_backend("attention", x.double())
    assert "up to 256" in unsupported_reason("attention", "triton", torch.randn(1, 1, 300))
    with use_kernels("flex"), pytest.raises(ValueError, match="it has no gradient on cpu"):
        resolve_backend("attention", x, x.clone().requires_grad_(), x)
    with use_kernels("flex"):
        assert resolve_backend("swiglu", x) == "sdpa"
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with use_kernels("triton"), pytest.raises(ValueError, match="triton is not installed"):
        resolve_backend("attention", x)


def test_shapes_are_checked():
    mask = AttentionMask([[KeyRange(3)]])
    with pytest.raises(ValueError, match="H % G"):
        attention(torch.ones(3, 3, 4), torch.ones(3, 2, 4), torch.ones(3, 2, 4), mask)
    with pytest.raises(ValueError, match="4 query rows, the mask describes 3"):
        attention(torch.ones(4, 2, 4), torch.ones(4, 2, 4), torch.ones(4, 2, 4), mask)
    with pytest.raises(ValueError, match="2 key rows, the mask describes 3"):
        attention(torch.ones(3, 2, 4), torch.ones(2, 2, 4), torch.ones(2, 2, 4), mask)
    with pytest.raises(ValueError, match=re.escape("a mask on meta: expected one device; use mask.to(q.device)")):
        attention(torch.ones(3, 2, 4), torch.ones(3, 2, 4), torch.ones(3, 2, 4), mask.to("meta"))


@pytest.mark.parametrize("name", packs())
def test_dropout_takes_single_probabilities(name):
    """Values are unit vectors, so that the result is the probabilities: each is 0, or larger by 1 / (1 - rate)."""
    mask = packs()[name]
    width, rate = 64, 0.25
    assert mask.n_keys <= width
    q = torch.randn(mask.n_queries, N_HEADS, width)
    k = torch.randn(mask.n_keys, N_GROUPS, width)
    v = torch.eye(width)[: mask.n_keys, None].expand(-1, N_GROUPS, -1)
    whole = attention_reference(q, k, v, mask)
    draws = torch.stack([attention(q, k, v, mask, dropout=rate) for _ in range(40)])
    kept = draws != 0
    torch.testing.assert_close(draws, torch.where(kept, whole / (1 - rate), 0.0))
    there = (whole > 0).expand_as(draws)
    n = int(there.sum())
    # of so many independent draws, five deviations
    assert abs(float(kept[there].float().mean()) - (1 - rate)) < 5 * (rate * (1 - rate) / n) ** 0.5
    assert not torch.equal(draws[0], draws[1])


def test_dropout_of_a_sample_has_a_gradient():
    mask = AttentionMask([[KeyRange(5)], [KeyRange(3)]])
    q, k, v = inputs(mask, grad=True)
    torch.manual_seed(0)
    attention(q, k, v, mask, dropout=0.5).square().sum().backward()
    assert all(bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in (q, k, v))
