"""The one description of an interleaved sequence: segments, the items that fill them, and packs of many samples.

Masks, positions, expert choice and losses all come from the segment table; there is no second description.
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

    The mask rule, once, for training, prefill and denoising: a row sees another of its sample when that one's
    segment is visible or is its own, and it stands before, or both stand in one full segment.

    `advance` is how far the rotary clock moves past the segment. Rows of a causal segment count up from the clock,
    rows of a full one share it. A `joined` segment is one block with the segment before it: frames of one video see
    each other, each at its own clock. Length 0 is a dropped condition that still moves the clock.
    """

    length: int
    attention: Literal["causal", "full"]
    visible: bool = True
    advance: int
    joined: bool = False


@dataclass(frozen=True, kw_only=True)
class CachedPrefix:
    """What a sample already holds in a cache: rows, the rotary clock after them, where its buffer begins."""

    length: int = 0
    next_position: int = 0
    buffer_start: int | None = None


@dataclass(frozen=True)
class PackedLayout:
    """Where the rows of packed samples lie, at which rotary position, and who sees whom."""

    segment_starts: tuple[tuple[int, ...], ...]  # first row of each segment, by sample
    lengths: tuple[int, ...]  # rows a sample
    next_positions: tuple[int, ...]  # the rotary clock after each sample
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
    """Pack samples end to end. `past` says what each sample's rows come after; nothing unless given.

    Worked rows, one sample: text of 3, clean image of 2 tokens and markers, noised image of 1 token and markers

        row       0  1  2 | 3  4  5  6 | 7  8  9
        position  0  1  2 | 3  3  3  3 | 4  4  4      the clock then stands at 4: a noised image does not move it
    """
    prefixes = prefixes or [CachedPrefix()] * len(samples)
    row, starts, next_positions, positions, key_ranges = 0, [], [], [], []
    for segments, prefix in zip(samples, prefixes, strict=True):
        position, sample_starts = prefix.next_position, []
        for segment in segments:
            sample_starts.append(row)
            positions.append(position + torch.arange(segment.length) * (segment.attention == "causal"))
            row, position = row + segment.length, position + segment.advance
        starts.append(tuple(sample_starts))
        next_positions.append(position)
        key_ranges.append([KeyRange(prefix.length, full=True), *_key_ranges(segments)])
    lengths = tuple(sum(segment.length for segment in segments) for segments in samples)
    key_starts = None if prefixes[0].buffer_start is None else [p.buffer_start or 0 for p in prefixes]
    mask = AttentionMask(key_ranges, query_lengths=lengths, key_starts=key_starts, device=device)
    return PackedLayout(tuple(starts), lengths, tuple(next_positions), torch.cat(positions).to(device), mask)


def _key_ranges(segments: Sequence[Segment]) -> list[KeyRange]:
    blocks: list[KeyRange] = []
    for segment in segments:
        if segment.joined:
            blocks[-1] = KeyRange(blocks[-1].length + segment.length, full=True, visible=segment.visible)
        else:
            blocks.append(KeyRange(segment.length, full=segment.attention == "full", visible=segment.visible))
    return blocks
