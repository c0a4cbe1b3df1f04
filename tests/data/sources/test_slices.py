"""Parts of datasets: the same rows as in the whole, in its chunks, with its numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.data import make
from unimm.data.sources.formats import open_source
from unimm.data.sources.slices import SourceSlice, split_source

N = 23


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A dataset of rows, of which one is broken, and one of tars, whose rows are read together."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"parts": [{"text": f"row {i}"}]} for i in range(N)]
    make.write_lines(folder / "rows.jsonl", [{} if i == 7 else row for i, row in enumerate(rows)])
    make.make_webdataset(folder / "tars")
    return [open_source(folder / "rows.jsonl", format="records"), open_source(folder / "tars")]


def told(source, rows):
    return [(one.row, type(one)) for one in source.read(rows)]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0, 1]), st.data())
def test_rows_are_those_of_the_whole(sources, number, data):
    source = sources[number]
    start = data.draw(st.integers(0, source.n_rows - 1))
    rows = range(start, data.draw(st.integers(start + 1, source.n_rows)))
    part = SourceSlice(source, rows)
    assert part.n_rows == len(rows) == part.chunk_ends[-1]
    a = data.draw(st.integers(0, len(rows)))
    b = data.draw(st.integers(a, len(rows)))
    assert told(part, range(a, b)) == told(source, range(start + a, start + b))


@pytest.mark.parametrize(("share", "n"), [(0.001, 1), (0.1, 2), (0.5, 12), (0.95, 22)])
def test_a_share_of_the_last_rows_is_held_out(sources, share, n):
    source = sources[0]
    trained, held_out = split_source(source, share)
    assert (trained.n_rows, held_out.n_rows) == (N - n, n)
    assert told(trained, range(N - n)) + told(held_out, range(n)) == told(source, range(N))


def test_something_must_be_left(sources, tmp_path):
    make.write_lines(tmp_path / "one.jsonl", [{"parts": [{"text": "a"}]}])
    with pytest.raises(
        ValueError, match=r"held_out 0.5 of .*one.jsonl, which has 1 rows: expected one that leaves a row"
    ):
        split_source(open_source(tmp_path / "one.jsonl", format="records"), 0.5)
    with pytest.raises(ValueError, match="within 23"):
        SourceSlice(sources[0], range(3, N + 1))
