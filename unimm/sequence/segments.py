"""The one description of an interleaved sequence: segments, the items that fill them, and packs of many samples.

Masks, positions, expert choice and losses all come from the segment table; there is no second description.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unimm.kernels import Block, Mask


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
    attend: Literal["causal", "full"]
    visible: bool = True
    advance: int
    joined: bool = False


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a sample already holds in a cache: rows, the rotary clock after them, where its buffer begins."""

    length: int = 0
    clock: int = 0
    start: int | None = None


@dataclass(frozen=True)
class Layout:
    """Where the rows of packed samples lie, at which rotary position, and who sees whom."""

    starts: tuple[tuple[int, ...], ...]  # first row of each segment, by sample
    lengths: tuple[int, ...]  # rows a sample
    clocks: tuple[int, ...]  # the rotary clock after each sample
    positions: Tensor  # [N]
    mask: Mask

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout on a device."""
        return replace(self, positions=self.positions.to(device), mask=self.mask.to(device))


def lay_out(
    samples: Sequence[Sequence[Segment]], past: Sequence[Past] | None = None, *, device: torch.device | str = "cpu"
) -> Layout:
    """Pack samples end to end. `past` says what each sample's rows come after; nothing unless given.

    Worked rows, one sample: text of 3, clean image of 2 tokens and markers, noised image of 1 token and markers

        row       0  1  2 | 3  4  5  6 | 7  8  9
        position  0  1  2 | 3  3  3  3 | 4  4  4      the clock then stands at 4: a noised image does not move it
    """
    past = past or [Past()] * len(samples)
    row, starts, clocks, positions, blocks = 0, [], [], [], []
    for segments, before in zip(samples, past, strict=True):
        clock, sample_starts = before.clock, []
        for segment in segments:
            sample_starts.append(row)
            positions.append(clock + torch.arange(segment.length) * (segment.attend == "causal"))
            row, clock = row + segment.length, clock + segment.advance
        starts.append(tuple(sample_starts))
        clocks.append(clock)
        blocks.append([Block(before.length, full=True), *_blocks(segments)])
    lengths = tuple(sum(segment.length for segment in segments) for segments in samples)
    key_starts = None if past[0].start is None else [p.start or 0 for p in past]
    mask = Mask(blocks, queries=lengths, key_starts=key_starts, device=device)
    return Layout(tuple(starts), lengths, tuple(clocks), torch.cat(positions).to(device), mask)


def _blocks(segments: Sequence[Segment]) -> list[Block]:
    blocks: list[Block] = []
    for segment in segments:
        if segment.joined:
            blocks[-1] = Block(blocks[-1].length + segment.length, full=True, visible=segment.visible)
        else:
            blocks.append(Block(segment.length, full=segment.attend == "full", visible=segment.visible))
    return blocks
