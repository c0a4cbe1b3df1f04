"""Key maps: where each released tensor lies in our parameters."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

# a released name -> ours, or None where it may be there and nothing reads it. `{}` is one dotted part or a piece of it,
# `{*}` is the rest. Ours may end in `[0/3]`: theirs holds the first third of its rows; in `[1:3/3]`: the other two; in
# `[...]`: theirs lacks its axes of length 1; in `[swap]`: theirs has the second half of its rows first. Ours may be
# `a + b`: theirs holds the rows of several of ours, one above the other
KeyMap = Mapping[str, str | None]


@dataclass(frozen=True)
class Place:
    """Where a released tensor lies in ours: all of a parameter, `length` of `parts` equal shares of its rows from `part` on,
    its numbers without the axes of length 1 (`squeezed`), its rows with the halves the other way round (`swapped`), or
    the rows of a `stack` of parameters, one above the other."""

    name: str
    part: int = 0
    parts: int = 1
    length: int = 1
    squeezed: bool = False
    swapped: bool = False
    stack: tuple[str, ...] = ()

    @classmethod
    def of(cls, target: str) -> "Place":
        """Read a target of a table, `name`, `name[0/3]`, `name[1:3/3]`, `name[...]`, `name[swap]` or `name + name`."""
        if " + " in target:
            return cls(target, stack=tuple(target.split(" + ")))
        name, _, how = target.removesuffix("]").partition("[")
        if "/" in how:
            share, _, parts = how.partition("/")
            first, _, stop = share.partition(":")
            return cls(name, int(first), int(parts), int(stop) - int(first) if stop else 1)
        return cls(name, squeezed=how == "...", swapped=how == "swap")

    def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The shape that the released tensor has where ours has this one."""
        if self.squeezed:
            return tuple(n for n in ours if n != 1)
        return (ours[0] // self.parts * self.length, *ours[1:]) if self.parts > 1 else tuple(ours)

    def take(self, ours: Tensor) -> Tensor:
        """The released tensor out of ours."""
        if self.swapped:
            return torch.cat(ours.chunk(2)[::-1])
        return self.share(ours) if self.parts > 1 else ours.reshape(self.shape(ours.shape))

    def share(self, ours: Tensor) -> Tensor:
        """The rows of ours that the released tensor holds."""
        rows = len(ours) // self.parts
        return ours[self.part * rows : (self.part + self.length) * rows]


def released_names(name: str, key_map: KeyMap) -> dict[str, Place]:
    """The released keys of one of our parameters, each with its place in it; none where no row knows the name."""
    found: dict[str, Place] = {}
    for source, target in key_map.items():
        if target is None:
            continue
        place = Place.of(target)
        if match := next(filter(None, (_pattern(one).fullmatch(name) for one in place.stack or (place.name,))), None):
            found[_filled(source, match)] = replace(place, name=name)
            if sum(place.length for place in found.values()) == place.parts:
                break
    return found


def is_ignored(key: str, key_map: KeyMap) -> bool:
    """Whether the table says that nothing reads a key."""
    return any(target is None and _pattern(source).fullmatch(key) for source, target in key_map.items())


def _filled(template: str, match: re.Match[str]) -> str:
    return template.replace("{*}", "{}").format(*match.groups())


@lru_cache(maxsize=4096)
def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(re.escape(source).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+?)"))
