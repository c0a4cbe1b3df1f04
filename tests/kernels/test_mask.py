"""Ranges, tiles and plots of masks against their definition, pair by pair."""

import re

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from unimm.kernels import AttentionMask, KeyRange
from unimm.kernels.attention.mask_plot import BACKGROUND, CAUSAL, FULL, INVISIBLE, MASKED
from unimm.kernels.attention.tile_schedule import MIN_RUNS, KeySpans, TileRuns

# causal, full, full and seen before
RULES = ({}, {"full": True}, {"full": True, "seen_before": True})
blocks = st.lists(
    st.builds(
        lambda length, rule, visible: KeyRange(length, visible=visible, **rule),
        st.integers(0, 7),
        st.sampled_from(RULES),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)
SIZES = ((1, 1), (4, 4), (8, 3), (16, 16))


def by_definition(sample: list[KeyRange]) -> Tensor:
    """The rule of unimm.sequence.segments, one pair at a time."""
    of = [(i, block) for i, block in enumerate(sample) for _ in range(block.length)]
    rows = [
        [
            ((b.visible or i == j) and (k <= q or (i == j and b.full))) or (b.seen_before and i < j)
            for k, (j, b) in enumerate(of)
        ]
        for q, (i, _) in enumerate(of)
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(of), len(of))


def seen_by(ranges: Tensor, n: int) -> Tensor:
    """[N, M] of ranges [R, 2, M]."""
    rows = torch.arange(n)[:, None]
    return ((rows >= ranges[:, :1]) & (rows < ranges[:, 1:])).any(0)


def listed(ptr: Tensor, runs: Tensor, shape: tuple[int, int]) -> Tensor:
    """Runs as a matrix of tiles; they must be in order, apart and inside."""
    out = torch.zeros(shape, dtype=torch.bool)
    for i, (a, z) in enumerate(zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)):
        free = 0
        for begin, end in runs[2 * a : 2 * z].reshape(-1, 2).tolist():
            assert free <= begin < end <= shape[1]
            out[i, begin:end], free = True, end + 1
    assert len(runs) >= 2 * MIN_RUNS and len(runs) & (len(runs) - 1) == 0 and not runs[2 * ptr[-1] :].any()
    return out


def agree(mask: AttentionMask, expected: Tensor) -> None:
    """Ranges, spans and tiles of every size against a dense mask."""
    n, m = expected.shape
    assert mask.ranges.dtype == torch.int32 and mask.ranges.shape[1:] == (2, m)
    assert torch.equal(seen_by(mask.ranges, n), expected)
    assert torch.equal(mask.dense(), expected)
    assert mask.spans.n_visible_pairs == int(expected.sum())
    for rows, keys in SIZES:
        shape = (-(-n // rows), -(-m // keys))
        padded = torch.zeros(shape[0] * rows, shape[1] * keys, dtype=torch.long)
        padded[:n, :m] = expected
        counts = padded.view(shape[0], rows, shape[1], keys).sum((1, 3))
        full = counts == rows * keys
        part = (counts > 0) & ~full
        tiles = mask.schedule(rows, keys)
        for runs, transposed in ((tiles.by_row, False), (tiles.by_key, True)):
            assert isinstance(runs, TileRuns) and all(t.dtype == torch.int32 for t in runs)
            for ptr, pairs, want in ((*runs[:2], full), (*runs[2:], part)):
                want = want.T if transposed else want
                assert torch.equal(listed(ptr, pairs, tuple(want.shape)), want), (rows, keys)
        assert (tiles.n_full, tiles.n_partial, tiles.n_all) == (int(full.sum()), int(part.sum()), full.numel())


@st.composite
def layouts(draw: st.DrawFn) -> tuple[AttentionMask, Tensor]:
    """Samples of which some rows ask, over keys with gaps; and what their rule gives."""
    samples = draw(st.lists(blocks, min_size=1, max_size=4))
    totals = [sum(b.length for b in sample) for sample in samples]
    queries = [draw(st.integers(0, n)) for n in totals]
    starts, at = [], 0
    for n in totals:
        starts.append(at + draw(st.integers(0, 3)))
        at = starts[-1] + n
    expected = torch.zeros(sum(queries), at, dtype=torch.bool)
    row = 0
    for sample, n, m, start in zip(samples, queries, totals, starts, strict=True):
        expected[row : row + n, start : start + m] = by_definition(sample)[m - n :]
        row += n
    return AttentionMask(samples, query_lengths=queries, key_starts=starts), expected


@st.composite
def any_ranges(draw: st.DrawFn) -> tuple[AttentionMask, Tensor]:
    """Ranges of any kind: wild ones, ones that grow, steps of one, empty ones, one or two a key."""
    n, m = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(("wild", "growing", "window")))
    a, b = torch.tensor(draw(st.lists(st.integers(0, n), min_size=4 * m, max_size=4 * m))).reshape(2, 2, m)
    if kind == "growing":
        a, b = a.sort(1).values, b.sort(1).values
    if kind == "window":
        a = (torch.arange(m) // draw(st.integers(1, 3))).clamp(max=n).expand(2, -1)
        b = (a + torch.tensor([[draw(st.integers(0, 5))], [draw(st.integers(0, 9))]])).clamp(max=n)
    second = (a[1], b[1]) if draw(st.booleans()) else None
    both = torch.stack((a, b), 1)
    return AttentionMask.from_ranges(a[0], b[0], second, n_queries=n), seen_by(both if second else both[:1], n)


def docstring_masks(text: str) -> list[tuple[list[list[bool]], list[list[int]]]]:
    """The example masks of a docstring, one per column of text: cells, and the numbers at the end of each row."""
    lines = [re.split(r"\brow \d", line)[1:] for line in text.splitlines()]
    examples = []
    for column in zip(*filter(None, lines), strict=True):
        words = [row.split() for row in column]
        cells = [[word == "x" for word in row if word in "x."] for row in words]
        examples.append((cells, [[int(word) for word in row if word.isdigit()] for row in words]))
    return examples


def test_the_rows_of_the_docstring():
    mask = AttentionMask([[KeyRange(3), KeyRange(2, full=True), KeyRange(2, full=True, visible=False), KeyRange(1)]])
    ((cells, bounds),) = docstring_masks(AttentionMask.__doc__)
    assert len(cells) == 8
    assert cells == mask.dense_sample(0).tolist() == mask.dense().tolist()
    assert bounds == mask.ranges[0].T.tolist()


def test_the_rows_of_from_ranges():
    examples = docstring_masks(AttentionMask.from_ranges.__doc__)
    assert len(examples) == 3
    for cells, bounds in examples:
        first, last, *second = torch.tensor(bounds).T
        mask = AttentionMask.from_ranges(first, last, tuple(second) or None)
        assert cells == mask.dense().tolist()
        assert len(mask.ranges) == (2 if second else 1)


@given(layouts())
@settings(max_examples=150, deadline=None)
def test_a_mask_is_its_definition(case):
    mask, expected = case
    agree(mask, expected)
    for i, (row, n, key, m) in enumerate(
        zip(mask.query_starts, mask.query_lengths, mask.key_starts, mask.key_lengths, strict=True)
    ):
        assert torch.equal(mask.dense_sample(i), expected[row : row + n, key : key + m])
    assert torch.equal(AttentionMask.from_table(mask.table).ranges, mask.ranges)


@given(any_ranges())
@settings(max_examples=150, deadline=None)
def test_ranges_of_any_kind(case):
    agree(*case)


@pytest.mark.nightly
@given(layouts(), any_ranges())
@settings(max_examples=3000, deadline=None)
def test_thousands(one, other):
    agree(*one)
    agree(*other)


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_calls_hold_every_pair_once(case):
    mask, expected = case
    for calls, back in (mask.padded_calls, mask.unpadded_calls):
        parts = []
        for q_rows, k_rows, allowed in calls:
            allowed = torch.ones(*q_rows.shape, k_rows.shape[1], dtype=torch.bool) if allowed is None else allowed
            part = torch.zeros(*q_rows.shape, mask.n_keys, dtype=torch.long)
            parts.append(part.scatter_add_(2, k_rows[:, None].expand_as(allowed), allowed.long()).flatten(0, 1))
        if mask.n_queries:
            assert torch.equal(torch.cat(parts)[back], expected.long())


def test_block_masks_are_the_same_tiles():
    window = torch.arange(300)
    masks = (
        AttentionMask(
            [
                [KeyRange(70), KeyRange(130, full=True), KeyRange(90, full=True, visible=False), KeyRange(50)],
                [KeyRange(200)],
            ]
        ),
        AttentionMask.from_ranges(
            window, (window + 40).clamp(max=300), (window.clamp(min=250), torch.full_like(window, 300))
        ),
    )
    for mask in masks:
        dense = mask.dense()
        flex = mask.block_mask(64, 32)
        rows, keys = torch.meshgrid(*map(torch.arange, dense.shape), indexing="ij")
        assert torch.equal(flex.mask_mod(0, 0, rows, keys), dense)
        tiles = mask.schedule(64, 32)
        assert int(flex.full_kv_num_blocks.sum()) == tiles.n_full and int(flex.kv_num_blocks.sum()) == tiles.n_partial
        assert flex.shape == (1, 1, *dense.shape)


def test_on_another_device_the_host_work_is_kept():
    mask = AttentionMask([[KeyRange(3)], [KeyRange(4, full=True)]])
    tiles = mask.schedule(4, 4)
    moved = mask.to("meta")
    assert mask.to("cpu") is mask
    assert moved.spans is mask.spans and moved.schedule(4, 4).n_full == tiles.n_full
    assert moved.ranges.is_meta and moved.schedule(4, 4).by_key.partial.is_meta and moved.dense().is_meta


def test_decoding_is_recognised():
    past = [KeyRange(5, full=True), KeyRange(1)]
    assert [t.tolist() for t in AttentionMask([past, past], query_lengths=[1, 1], key_starts=[0, 9]).decode_ranges] == [
        [0, 9],
        [6, 6],
    ]
    assert AttentionMask([past, past], query_lengths=[1, 2]).decode_ranges is None
    assert (
        AttentionMask([[KeyRange(5, full=True, visible=False), KeyRange(1)]], query_lengths=[1]).decode_ranges is None
    )
    assert AttentionMask.from_ranges(torch.zeros(3), torch.ones(3), n_queries=1).decode_ranges is None


def test_what_is_refused():
    with pytest.raises(ValueError, match="expected no more queries than rows"):
        AttentionMask([[KeyRange(3)]], query_lengths=[4])
    with pytest.raises(ValueError, match=r"from 0 to 9: expected rows 0 to 3; give `n_queries`"):
        AttentionMask.from_ranges(torch.zeros(3), torch.full((3,), 9))
    with pytest.raises(ValueError, match="0 rows"):
        AttentionMask([[]]).plot()


def test_spans_are_few():
    """A span a block, whatever the length: what keeps the schedule cheap."""
    mask = AttentionMask(
        [[KeyRange(500), KeyRange(4098, full=True), KeyRange(4098, full=True, visible=False), KeyRange(30)]] * 4
    )
    assert len(mask.spans.start) == 16
    assert len(KeySpans.from_ranges(mask.spans.ranges().astype(np.int64), mask.n_queries).start) == 16


def colours(plot) -> set[tuple[int, ...]]:
    return {tuple(map(int, colour)) for colour in np.unique(np.asarray(plot).reshape(-1, 3), axis=0)}


def test_plots():
    mask = AttentionMask(
        [[KeyRange(3), KeyRange(2, full=True), KeyRange(2, full=True, visible=False), KeyRange(1)], [KeyRange(4)]]
    )
    plot = mask.plot(size=12 * 12)
    assert plot.size == (144, 144)
    middles = np.asarray(plot)[6::12, 6::12]
    assert np.array_equal((middles != MASKED).any(-1), mask.dense().numpy())
    assert tuple(middles[4, 0]) == CAUSAL and tuple(middles[4, 3]) == FULL and tuple(middles[6, 5]) == INVISIBLE
    assert (0, 0, 0) in colours(plot)  # a line where the second sample begins

    tiled = np.asarray(mask.plot(size=12 * 12, tiles=(4, 4)))[6::12, 6::12]
    assert (tiled[0, 8:] == BACKGROUND).all() and tuple(tiled[0, 5]) not in (
        BACKGROUND,
        MASKED,
    )  # empty tiles are blank, others are not
    large = AttentionMask([[KeyRange(900), KeyRange(1200, full=True)], [KeyRange(900)]])
    assert large.plot(size=300).size == (300, 300) and large.plot(size=300, tiles=(128, 64)).size == (300, 300)
    assert AttentionMask.from_ranges(torch.zeros(9), torch.full((9,), 3), n_queries=3).plot(size=90).size == (90, 30)


@pytest.mark.parametrize(("name", "tiles"), [("mask", None), ("tiles", (8, 8))])
def test_the_images_of_the_guide_are_what_the_code_plots(name, tiles):
    first = [KeyRange(6), KeyRange(9, full=True, visible=False), KeyRange(9, full=True), KeyRange(4)]
    plotted = AttentionMask([first, [KeyRange(9, full=True), KeyRange(5)]]).plot(tiles=tiles)
    stored = Image.open(ROOT / "docs" / "images" / f"{name}.png")
    assert np.array_equal(np.asarray(plotted), np.asarray(stored))
