"""The packer: no sample is lost or doubled, packs keep to their limits, a state goes on where it was."""

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimm.data.mix import Drawn
from unimm.data.records import BrokenRow
from unimm.training.data_config import PackingConfig
from unimm.training.packing import MAX_UNUSABLE, FixedSizeBatcher, TokenPacker, UniformBatcher


@dataclass(frozen=True)
class Tokens:
    n_tokens: int


class Lengths:
    """A stream of rows whose lengths a seed decides; None is a broken one."""

    def __init__(self, lengths, *, mandatory=(), seed=0, groups=("a", "b")):
        self.lengths = lengths
        self.mandatory = mandatory
        self.rng = random.Random(seed)
        self.groups = groups
        self.counts = dict.fromkeys((*groups, *mandatory), 0)
        self.drawn = []

    def choose(self):
        return self.rng.choice(self.groups)

    def draw(self, group):
        row = self.counts[group]
        self.counts[group] += 1
        length = self.lengths[(row + len(group)) % len(self.lengths)]
        item = BrokenRow(source=group, row=row, reason="bad") if length is None else Tokens(length)
        self.drawn.append((group, row))
        return Drawn(group=group, epoch=0, row=row, item=item)


def keys(drawn):
    return [(one.group, one.row) for one in drawn]


PACKING = PackingConfig(
    expected_tokens=20, max_tokens=24, max_tokens_per_sample=16, buffer_size=3, prefer_buffer_before=10
)


@given(
    st.lists(st.none() | st.integers(1, 20), min_size=1, max_size=9).filter(
        lambda some: any(n and n <= 4 for n in some)
    ),
    st.integers(0, 4),
    st.integers(1, 40),
    st.integers(0, 2),
)
@settings(max_examples=150, deadline=None)
def test_every_row_is_packed_once_or_waits_or_is_counted(lengths, buffer_size, prefer, n_mandatory):
    packing = replace(PACKING, buffer_size=buffer_size, prefer_buffer_before=prefer)
    stream = Lengths(lengths, mandatory=("m", "n")[:n_mandatory])
    packer = TokenPacker(stream, packing)
    packs = [packer.next_group() for _ in range(12)]
    packed = [key for pack in packs for key in keys(pack.samples)]
    n_others = sum(len(pack.broken) + len(pack.left_out) for pack in packs)
    assert len(set(packed)) == len(packed)
    assert len(stream.drawn) == len(packed) + len(packer.waiting) + n_others == sum(pack.n_rows for pack in packs)
    assert set(packed) | set(keys(packer.waiting)) <= set(stream.drawn)
    # a full buffer may hold the sample that ended a pack, too
    assert len(packer.waiting) <= buffer_size + 1
    for pack in packs:
        assert pack.n_tokens == sum(one.item.n_tokens for one in pack.samples) <= packing.max_tokens
        assert all(one.item.n_tokens <= packing.max_tokens_per_sample for one in pack.samples)
        assert tuple(one.group for one in pack.samples[:n_mandatory]) == stream.mandatory
        # it ends early only where the buffer has no room for a sample more
        room = packing.max_tokens - pack.n_tokens
        assert pack.n_tokens >= packing.expected_tokens or room < packing.max_tokens_per_sample or pack.left_out


def test_a_pack_by_hand():
    """12 waits behind 15, comes first in the next pack, and the sample that is too long is left out."""
    packing = replace(PACKING, prefer_buffer_before=1)
    stream = Lengths([15, 12, 6, 17, 9, None, 5], groups=("",))
    packer = TokenPacker(stream, packing)
    first = packer.next_group()
    assert [one.item.n_tokens for one in first.samples] == [15, 6]
    assert [one.item.n_tokens for one in packer.waiting] == [12] and not first.left_out
    second = packer.next_group()
    assert [one.item.n_tokens for one in second.samples] == [12, 9]
    assert second.left_out == [
        "row 3 of the group  has 17 tokens, expected at most 16 (max_tokens_per_sample)",
    ]
    third = packer.next_group()
    assert [one.item.n_tokens for one in third.samples] == [5, 15] and [one.reason for one in third.broken] == ["bad"]
    assert third.n_rows == 3 and third.n_tokens == 20


def test_what_finds_no_room_beside_mandatory_samples_does_not_wait_for_ever():
    stream = Lengths([16, 2], mandatory=("mm",), groups=("",))
    stream.lengths = [16]
    packer = TokenPacker(stream, replace(PACKING, buffer_size=1))
    packs = [packer.next_group() for _ in range(5)]
    assert all(keys(pack.samples) == [("mm", i)] for i, pack in enumerate(packs))
    assert len(packer.waiting) <= 3
    assert "for which max_tokens leaves no room beside the samples of the mandatory groups" in packs[-1].left_out[0]


def test_a_mandatory_sample_that_does_not_fit_behind_another():
    stream = Lengths([14, 16, 8], mandatory=("", "m"))
    pack = TokenPacker(stream, PACKING).next_group()
    assert [one.item.n_tokens for one in pack.samples[:2]] == [14, 8]
    assert pack.left_out == ["row 0 of the group m has 16 tokens, expected at most 10 (what max_tokens leaves for it)"]


@pytest.mark.parametrize(
    ("lengths", "what"), [([None], "row .* of a: bad"), ([17], "has 17 tokens, expected at most 16")]
)
def test_rows_of_which_none_can_be_used(lengths, what):
    stream = Lengths(lengths, groups=("a",))
    with pytest.raises(
        ValueError, match=f"{MAX_UNUSABLE} rows in turn of the group a are broken or too long; .*{what}"
    ):
        TokenPacker(stream, PACKING).next_group()


def test_batches_of_a_size():
    stream = Lengths([3, None, 4], mandatory=("m",))
    batch = FixedSizeBatcher(stream, 4).next_group()
    assert len(batch.samples) == 4 and batch.samples[0].group == "m" and batch.n_rows == 4 + len(batch.broken)
    with pytest.raises(ValueError, match="got batch_size 1 and the mandatory groups m, n: expected a sample for each"):
        FixedSizeBatcher(Lengths([1], mandatory=("m", "n")), 1)


def test_batches_of_one_key():
    """No sample is lost, each batch is of one key, and a state goes on where it was."""
    stream = Lengths([1, 3, None, 1, 2, 3, 1], groups=("a", "b"))
    batcher = UniformBatcher(stream, 2, key=lambda sample: sample.n_tokens)
    batches = [batcher.next_group() for _ in range(8)]
    assert all(len({one.item.n_tokens for one in batch.samples}) == 1 for batch in batches)
    assert {batch.samples[0].item.n_tokens for batch in batches} == {1, 2, 3}
    packed = [key for batch in batches for key in keys(batch.samples)]
    n_broken = sum(len(batch.broken) for batch in batches)
    assert len(set(packed)) == len(packed) == 16
    assert len(stream.drawn) == 16 + len(batcher.waiting) + n_broken == sum(batch.n_rows for batch in batches)
    # with what waits given, as after a stop
    again = UniformBatcher(stream, 2, key=lambda sample: sample.n_tokens, waiting=batcher.waiting)
    waiting = keys(batcher.waiting)
    rest = again.next_group()
    assert set(keys(rest.samples)) <= set(waiting) | set(stream.drawn[-rest.n_rows :])
    with pytest.raises(ValueError, match="the mandatory groups m, and batches of samples of one size: expected none"):
        UniformBatcher(Lengths([1], mandatory=("m",)), 2, key=len)
