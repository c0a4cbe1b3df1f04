"""Extending an image beyond its sides: which window of tokens is decoded next (extrapolation, arXiv 2408.12528).

Axes: P images, h w the tokens of a canvas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unimm.generation.numbers import MOST, parse_int
from unimm.processing.images.io import MAX_PIXELS

DIRECTIONS = ("left", "right", "up", "down")


def parse_directions(given: Any) -> list[tuple[str, str | None]]:
    """The directions of a call with their own texts. Raises ValueError for what is none."""
    wanted = [given] if isinstance(given, str) else given
    if not isinstance(wanted, list | tuple) or not wanted:
        raise ValueError(f"got directions {given!r:.80}: expected some of {', '.join(DIRECTIONS)}")
    parsed: list[tuple[str, str | None]] = []
    for one in wanted:
        direction, text = one if isinstance(one, list | tuple) and len(one) == 2 else (one, None)
        has_text = text is None or (isinstance(text, str) and text.strip())
        if direction not in DIRECTIONS or not has_text:
            raise ValueError(
                f"got the direction {one!r:.80}: expected one of {', '.join(DIRECTIONS)}, or a pair of one and a text"
            )
        parsed.append((direction, text))
    return parsed


@dataclass(frozen=True, kw_only=True)
class Extension:
    """side: of a window, in tokens; kept: of these, how many lie on what there is already."""

    side: int
    kept: int

    @classmethod
    def plan(cls, side: int, offset: Any, rounds: Sequence[tuple[str, str | None]], *, stride: int) -> "Extension":
        """The windows of a call. Raises ValueError for an offset that leaves nothing to see or to do, and for results
        of more than MAX_PIXELS."""
        offset = parse_int(offset, "offset", low=side // 2 - side + 1, high=side // 2 - 1)
        new = side - (side // 2 - offset)
        sideways = sum(direction in ("left", "right") for direction, _ in rounds)
        width = side + sideways * new
        height = side + (len(rounds) - sideways) * new
        if len(rounds) > MOST or width * height * stride**2 > MAX_PIXELS:
            raise ValueError(
                f"got {len(rounds)} directions: they make an image of {height * stride} x {width * stride}, expected at "
                f"most {MAX_PIXELS:,} pixels"
            )
        return cls(side=side, kept=side // 2 - offset)

    def grow(self, canvas: Tensor, direction: str, mask_token: int) -> tuple[Tensor, list[tuple[slice, slice]]]:
        """A canvas [P, h, w] with new masked tokens on one side, and the windows (rows, columns) to decode in turn.

        The original has one window: its canvas grows along one axis only. A longer side is covered by several, of which
        each looks back on what the one before it has drawn.
        """
        sideways = direction in ("left", "right")
        shape = list(canvas.shape)
        shape[2 if sideways else 1] = self.side - self.kept
        new = canvas.new_full(shape, mask_token)
        pair = (new, canvas) if direction in ("left", "up") else (canvas, new)
        grown = torch.cat(pair, 2 if sideways else 1)
        length = grown.shape[2 if sideways else 1]
        start = 0 if direction in ("left", "up") else length - self.side
        along = slice(start, start + self.side)
        across = [slice(at, at + self.side) for at in self._starts(grown.shape[1 if sideways else 2])]
        return grown, [(one, along) if sideways else (along, one) for one in across]

    def _starts(self, length: int) -> list[int]:
        """Where windows begin that cover a side of a canvas."""
        last = length - self.side
        return [*range(0, last, self.side - self.kept), last]
