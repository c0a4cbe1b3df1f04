"""The description of an interleaved sequence: segments, and the layout of many samples packed end to end.

Masks, positions, expert choice and losses all follow from the segments; nothing else describes a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unimm.kernels import AttentionMask, KeyRange


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive rows of one sample.

    The rule of the mask, for training, prefill and denoising: a row attends to another of its sample when that one's
    segment is visible or is its own, and it stands before, or both stand in one full segment. To a full segment that is
    `seen_before` the rows before it attend, too, as far as they are in the same forward.

    `advance` is the number of rotary positions to the next segment. Rows of a causal segment take one position each,
    rows of a full one share one, unless they have `distinct_positions`. A `joined` segment is one block with the segment
    before it: frames of one video attend to each other, each at its own position. A segment of length 0 is a dropped
    condition that still advances the position.
    """

    length: int
    attention: Literal["causal", "full"]
    visible: bool = True
    advance: int
    joined: bool = False
    distinct_positions: bool = False
    seen_before: bool = False


@dataclass(frozen=True, kw_only=True)
class CachedPrefix:
    """The cached rows that a sample's new rows follow: their number, the next rotary position, their buffer row."""

    length: int = 0
    next_position: int = 0
    buffer_start: int | None = None


@dataclass(frozen=True)
class PackedLayout:
    """The rows of packed samples: where they lie, at which rotary position, and which attends to which."""

    segment_starts: tuple[tuple[int, ...], ...]  # first row of each segment, by sample
    lengths: tuple[int, ...]  # rows per sample
    next_positions: tuple[int, ...]  # the rotary position after each sample
    position_ids: Tensor  # [N]
    mask: AttentionMask

    def to(self, device: torch.device | str) -> "PackedLayout":
        """The same layout on a device."""
        return replace(self, position_ids=self.position_ids.to(device), mask=self.mask.to(device))


def build_layout(
    samples: Sequence[Sequence[Segment]],
    prefixes: Sequence[CachedPrefix] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> PackedLayout:
    """Lay samples end to end. prefixes: the cached rows that each sample follows; none unless given.

    For example, one sample: a text of 3, a clean image of 2 tokens between boundary ids, a noised image of 1 token

        row       0  1  2 | 3  4  5  6 | 7  8  9
        position  0  1  2 | 3  3  3  3 | 4  4  4      the next position is 4 still: a noised image does not advance it
    """
    prefixes = prefixes or [CachedPrefix()] * len(samples)
    row = 0
    starts = []
    next_positions = []
    positions = []
    key_ranges = []
    for segments, prefix in zip(samples, prefixes, strict=True):
        position = prefix.next_position
        sample_starts = []
        for segment in segments:
            sample_starts.append(row)
            moves = segment.attention == "causal" or segment.distinct_positions
            positions.append(position + torch.arange(segment.length) * moves)
            row += segment.length
            position += segment.advance
        starts.append(tuple(sample_starts))
        next_positions.append(position)
        key_ranges.append([KeyRange(prefix.length, full=True), *_key_ranges(segments)])
    lengths = tuple(sum(segment.length for segment in segments) for segments in samples)
    key_starts = None if prefixes[0].buffer_start is None else [prefix.buffer_start or 0 for prefix in prefixes]
    mask = AttentionMask(key_ranges, query_lengths=lengths, key_starts=key_starts, device=device)
    return PackedLayout(tuple(starts), lengths, tuple(next_positions), torch.cat(positions).to(device), mask)


def _key_ranges(segments: Sequence[Segment]) -> list[KeyRange]:
    key_ranges: list[KeyRange] = []
    for segment in segments:
        if segment.joined:
            length = key_ranges[-1].length + segment.length
            key_ranges[-1] = KeyRange(length, full=True, visible=segment.visible)
        else:
            full = segment.attention == "full"
            key_ranges.append(
                KeyRange(segment.length, full=full, visible=segment.visible, seen_before=segment.seen_before)
            )
    return key_ranges
