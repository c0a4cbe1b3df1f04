"""Connected patches of a mask, and masks one pixel wider or narrower, in numpy alone."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)
Mask = NDArray[np.bool_]
# a row and the half-open range of columns that it fills
Run = tuple[int, int, int]


def connected_components(mask: Mask, *, min_pixels: int) -> list[Mask]:
    """The parts of mask [h, w] that hang together along edges and have at least so many pixels, from the top."""
    groups: list[list[Run]] = []
    above: list[tuple[Run, int]] = []
    owner: list[int] = []
    for run in _runs(mask):
        above = [(other, group) for other, group in above if other[0] >= run[0] - 1]
        number = len(groups)
        groups.append([run])
        owner.append(number)
        for other, group in above:
            if other[0] == run[0] - 1 and other[1] < run[2] and run[1] < other[2]:
                _merge(groups, owner, _root(owner, group), _root(owner, number))
        above.append((run, number))
    return [_filled(runs, mask.shape) for runs in groups if sum(end - start for _, start, end in runs) >= min_pixels]


def _runs(mask: Mask) -> list[Run]:
    """The runs of a mask, row by row."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))))
    rows, starts = np.nonzero(edges == 1)
    # both lists go row by row, so the n-th start and the n-th end are of one run
    ends = np.nonzero(edges == -1)[1]
    return list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))


def _root(owner: list[int], group: int) -> int:
    """The group that a group was merged into at last."""
    while owner[group] != group:
        group = owner[group]
    return group


def _merge(groups: list[list[Run]], owner: list[int], into: int, gone: int) -> None:
    """Make two groups one."""
    if into != gone:
        owner[gone] = into
        groups[into] += groups[gone]
        groups[gone] = []


def _filled(runs: list[Run], shape: tuple[int, ...]) -> Mask:
    """The runs as a mask."""
    mask = np.zeros(shape, dtype=bool)
    for row, start, end in runs:
        mask[row, start:end] = True
    return mask


def pad_zeros(field: NDArray[T], border: int) -> NDArray[T]:
    """The field [h, w, ...] with zeros around it; np.pad takes ten times as long."""
    wide = np.zeros((field.shape[0] + 2 * border, field.shape[1] + 2 * border, *field.shape[2:]), field.dtype)
    wide[border:-border, border:-border] = field
    return wide


def dilate(mask: Mask) -> Mask:
    """The mask and its eight neighbours."""
    wide = pad_zeros(mask, 1)
    tall = wide[:-2] | wide[1:-1] | wide[2:]
    return tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]


def erode(mask: Mask) -> Mask:
    """The pixels whose four neighbours are in the mask."""
    wide = pad_zeros(mask, 1)
    return mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
