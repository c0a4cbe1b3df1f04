"""The mask against its definition, and every way of computing attention against the plain one."""
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimm.kernels import Block, Mask, attention, backend, use_kernels
from unimm.kernels import attention as op
from unimm.kernels.attention import _attention_by_block, _attention_padded, attention_reference

blocks = st.lists(st.builds(Block, st.integers(0, 5), full=st.booleans(), visible=st.booleans()), min_size=1, max_size=6)


def by_definition(sample: list[Block]) -> torch.Tensor:
    """The rule of unimm.sequence, one pair at a time."""
    of = [(i, block) for i, block in enumerate(sample) for _ in range(block.length)]
    rows = [
        [(b.visible or i == j) and (k <= q or (i == j and b.full)) for k, (j, b) in enumerate(of)]
        for q, (i, _) in enumerate(of)
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(of), len(of))


def test_the_rows_of_the_docstring():
    mask = Mask([[Block(3), Block(2, full=True), Block(2, full=True, visible=False), Block(1)]])
    lines = [line for line in Mask.__doc__.splitlines() if line.split()[:1] == ["row"] and "|" in line]
    assert len(lines) == 8
    for row, line in enumerate(lines):
        cells = [word for word in line.split() if word in "x."]
        assert [cell == "x" for cell in cells] == mask.of(0)[row].tolist()
        first, last = map(int, line.split()[-2:])
        assert mask.ranges(0)[:, row].tolist() == [first, last]


@given(st.lists(blocks, min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_mask_is_its_definition(samples):
    samples = [sample if sum(b.length for b in sample) else [Block(1)] for sample in samples]
    mask = Mask(samples)
    expected = torch.block_diag(*(by_definition(sample).float() for sample in samples)).bool()
    assert torch.equal(mask.dense(), expected)


@given(st.lists(blocks, min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_every_way_gives_the_same(samples, data):
    samples = [[*sample, Block(2, full=data.draw(st.booleans()))] for sample in samples]
    totals = [sum(b.length for b in sample) for sample in samples]
    queries = [data.draw(st.integers(1, n)) for n in totals]
    gaps = [data.draw(st.integers(0, 3)) for _ in totals]
    starts = [sum(totals[:i]) + sum(gaps[: i + 1]) for i in range(len(totals))]
    mask = Mask(samples, queries=queries, key_starts=starts)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(queries), 4, 8, generator=generator)
    k, v = torch.randn(2, starts[-1] + totals[-1] + 2, 2, 8, generator=generator)
    expected = attention_reference(q, k, v, mask)
    for way in (_attention_padded, _attention_by_block):
        torch.testing.assert_close(way(q, k, v, mask), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_every_way():
    first = [Block(3), Block(4, full=True), Block(3, full=True, visible=False), Block(2)]
    mask = Mask([first, [Block(40), Block(3, full=True)]])
    q, k, v = (torch.randn(sum(mask.keys), heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    truth = torch.autograd.grad(attention_reference(q, k, v, mask).square().sum(), (q, k, v))
    for way in (_attention_padded, _attention_by_block):
        got = torch.autograd.grad(way(q, k, v, mask).square().sum(), (q, k, v))
        torch.testing.assert_close(got, truth)


def test_long_samples_are_not_padded(monkeypatch):
    monkeypatch.setattr(import_module("unimm.kernels.attention"), "PADDED_ROWS", 4)
    mask = Mask([[Block(6, full=True)], [Block(5)]])
    q, k, v = torch.randn(3, 11, 2, 4)
    torch.testing.assert_close(attention(q, k, v, mask), attention_reference(q, k, v, mask))


def test_samples_may_be_empty_or_ask_nothing():
    mask = Mask([[Block(3)], [], [Block(2, full=True)], [Block(4)]], queries=[3, 0, 2, 0])
    q = torch.randn(5, 2, 4)
    k, v = torch.randn(2, 9, 2, 4)
    expected = attention_reference(q, k, v, mask)
    assert torch.isfinite(expected).all()
    for way in (_attention_padded, _attention_by_block):
        torch.testing.assert_close(way(q, k, v, mask), expected)


def test_unwritten_rows_do_not_leak():
    mask = Mask([[Block(2)], [Block(5)]], key_starts=[0, 4])
    q = torch.randn(7, 2, 4)
    k, v = torch.randn(2, 10, 2, 4)
    expected = attention_reference(q, k, v, mask)
    for t in (k, v):
        t[2:4], t[9:] = float("nan"), float("nan")
    torch.testing.assert_close(attention(q, k, v, mask), expected)
    torch.testing.assert_close(_attention_by_block(q, k, v, mask), expected)


def test_backend_is_chosen_and_refused(monkeypatch):
    mask = Mask([[Block(3)]])
    q, k, v = torch.randn(3, 3, 2, 4)
    with use_kernels("reference"):
        assert backend() == "reference"
        torch.testing.assert_close(op(q, k, v, mask), attention_reference(q, k, v, mask), rtol=0, atol=0)
    monkeypatch.setenv("UNIMM_KERNELS", "fast")
    with pytest.raises(ValueError, match="unknown kernel backend 'fast'.*reference"):
        op(q, k, v, mask)


def test_shapes_are_checked():
    mask = Mask([[Block(3)]])
    with pytest.raises(ValueError, match="H % G"):
        attention(torch.ones(3, 3, 4), torch.ones(3, 2, 4), torch.ones(3, 2, 4), mask)
    with pytest.raises(ValueError, match="4 query rows, the mask describes 3"):
        attention(torch.ones(4, 2, 4), torch.ones(4, 2, 4), torch.ones(4, 2, 4), mask)
    with pytest.raises(ValueError, match="more rows than it has"):
        Mask([[Block(3)]], queries=[4])
