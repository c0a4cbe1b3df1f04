"""Updates of low rank, and their translation from our linears to the released ones and back.

Where a linear of ours holds several released ones, as q, k and v in one, its update is cut into theirs; updates of theirs
are put together exactly, into a larger rank where they differ.

Axes: D inputs and F outputs of a linear, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unimm.checkpoint.keymap import KeyMap, Rename, Slice, Transform


@dataclass(frozen=True)
class LowRankUpdate:
    """W + scale * b a in place of a linear's W [F, D]: a [R, D], b [F, R]; with DoRA its rows then get these norms,
    magnitude [F]."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """(F, D) of the linear."""
        return len(self.b), self.a.shape[1]


Updates = Mapping[str, LowRankUpdate]  # by the names of linears


def released_linears(name: str, key_maps: Sequence[KeyMap]) -> dict[str, Transform]:
    """The released linears that a linear of ours holds, by their names. Raises ValueError where there is none."""
    for key_map in key_maps:
        if tensors := key_map.released_tensors(f"{name}.weight"):
            if all(isinstance(one, Rename | Slice) and key.endswith(".weight") for key, one in tensors.items()):
                return {key.removesuffix(".weight"): one for key, one in tensors.items()}
            break
    raise ValueError(
        f"{name} is no linear of the released files, so that an adapter of it cannot be saved: leave it out"
    )


def to_released(updates: Updates, key_maps: Sequence[KeyMap]) -> dict[str, LowRankUpdate]:
    """The updates of released linears that do the same as these of ours."""
    found: dict[str, LowRankUpdate] = {}
    for name, update in updates.items():
        for released, transform in released_linears(name, key_maps).items():
            b = transform.to_released([update.b])
            magnitude = None if update.magnitude is None else transform.to_released([update.magnitude])
            found[released] = replace(update, b=b, magnitude=magnitude)
    return found


def from_released(
    updates: Updates, linears: Mapping[str, tuple[int, int]], key_maps: Sequence[KeyMap], where: str
) -> dict[str, LowRankUpdate]:
    """The updates of our linears that do the same as these of released ones.

    linears: shapes (F, D) of those that may be adapted. Raises ValueError for updates of others, and for other shapes.
    """
    released = {name: released_linears(name, key_maps) for name in linears}
    known = {one for some in released.values() for one in some}
    if unknown := sorted(updates.keys() - known):
        raise ValueError(
            f"{where} adapts {', '.join(unknown[:3])} ({len(unknown)} in all), which this model does not have, or which "
            "may not be adapted: expected an adapter of the same family and size"
        )
    found: dict[str, LowRankUpdate] = {}
    for name, parts in released.items():
        if given := {one: updates[one] for one in parts if one in updates}:
            _check_shapes(given, parts, linears[name], where)
            found[name] = _put_together(given, parts, linears[name][0], where)
    return found


def _check_shapes(given: Updates, parts: Mapping[str, Transform], shape: tuple[int, int], where: str) -> None:
    whole = torch.empty(shape, device="meta")
    for name, update in given.items():
        expected = tuple(parts[name].to_released([whole]).shape)
        if update.shape != expected or update.b.shape[1] != update.rank:
            raise ValueError(
                f"{where} adapts {name} of shape {list(update.shape)}: expected {list(expected)}, and one rank; it is of "
                "a model of another size"
            )


def _put_together(given: Updates, parts: Mapping[str, Transform], n_outputs: int, where: str) -> LowRankUpdate:
    """One update of a linear of ours from those of the released ones that it holds."""
    first, *others = given.values()
    if not others and isinstance(parts[next(iter(given))], Rename):
        return first
    if all(torch.equal(first.a, one.a) and first.scale == one.scale for one in others):
        a = first.a
        scale = first.scale
        columns = [one.b for one in given.values()]
    else:
        # a block for each, zeros elsewhere
        a = torch.cat([one.a for one in given.values()])
        scale = 1.0
        columns = []
        before = 0
        for one in given.values():
            columns.append(F.pad(one.b * one.scale, (before, len(a) - before - one.rank)))
            before += one.rank
    b = _join_rows(dict(zip(given, columns, strict=True)), parts, n_outputs)
    magnitudes = {name: one.magnitude for name, one in given.items() if one.magnitude is not None}
    if not magnitudes:
        return LowRankUpdate(a, b, scale)
    if magnitudes.keys() != parts.keys():
        raise ValueError(
            f"{where} has a DoRA of {', '.join(magnitudes)} alone: expected one of {', '.join(parts)}, which are one "
            "linear here"
        )
    return LowRankUpdate(a, b, scale, _join_rows(magnitudes, parts, n_outputs))


def _join_rows(rows: Mapping[str, Tensor], parts: Mapping[str, Transform], n_outputs: int) -> Tensor:
    """The rows of each released linear at their places among ours; zeros elsewhere."""
    sample = next(iter(rows.values()))
    whole = sample.new_zeros(n_outputs, *sample.shape[1:])
    for name, some in rows.items():
        (whole,) = parts[name].to_ours(some, [whole])
    return whole
