"""Key maps: how the tensors of a released file become our parameters, and back.

In the names of an entry `{}` stands for one dotted part of a name, or a piece of one, and `{*}` for the rest of it.
What the placeholders of one name match fills those of the other, in order.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True)
class Transform(ABC):
    """A released tensor, and the parameters of ours that it is made from."""

    released: str

    def __post_init__(self) -> None:
        counts = {_placeholders(name) for name in (self.released, *self.our_names)}
        if len(counts) > 1:
            raise ValueError(f"got {self}: expected the same number of placeholders in every name")

    @property
    @abstractmethod
    def our_names(self) -> tuple[str, ...]:
        """Our names, in the order in which the methods take and return tensors."""

    @abstractmethod
    def named(self, released: str, ours: Sequence[str]) -> Self:
        """The same transform between other names."""

    @abstractmethod
    def to_released(self, ours: Sequence[Tensor]) -> Tensor:
        """The released tensor, from our parameters."""

    @abstractmethod
    def to_ours(self, released: Tensor, ours: Sequence[Tensor]) -> list[Tensor]:
        """New values of our parameters from the released tensor; `ours` are the present ones, on meta until loaded."""

    def matched(self, name: str) -> Self | None:
        """This transform with the placeholders filled so that one of our names is `name`; None where none can be."""
        for ours in self.our_names:
            if match := _match(ours, name):
                fill = [_filled(one, match.groups()) for one in (self.released, *self.our_names)]
                return self.named(fill[0], fill[1:])
        return None


@dataclass(frozen=True)
class _OneToOne(Transform):
    """A transform of a single parameter."""

    ours: str

    @property
    def our_names(self) -> tuple[str, ...]:
        return (self.ours,)

    def named(self, released: str, ours: Sequence[str]) -> Self:
        return replace(self, released=released, ours=ours[0])


@dataclass(frozen=True)
class Rename(_OneToOne):
    """The same tensor under another name."""

    def to_released(self, ours: Sequence[Tensor]) -> Tensor:
        return ours[0]

    def to_ours(self, released: Tensor, ours: Sequence[Tensor]) -> list[Tensor]:
        return [released]


@dataclass(frozen=True)
class Squeeze(_OneToOne):
    """The released tensor lacks our parameter's axes of length 1."""

    def to_released(self, ours: Sequence[Tensor]) -> Tensor:
        return ours[0].squeeze()

    def to_ours(self, released: Tensor, ours: Sequence[Tensor]) -> list[Tensor]:
        return [released.reshape(ours[0].shape)]


@dataclass(frozen=True)
class SwapHalves(_OneToOne):
    """The released tensor has the second half of our rows first."""

    def to_released(self, ours: Sequence[Tensor]) -> Tensor:
        return torch.cat(ours[0].chunk(2)[::-1])

    def to_ours(self, released: Tensor, ours: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(released.chunk(2)[::-1])]


@dataclass(frozen=True)
class Slice(_OneToOne):
    """The released tensor is a part of our rows: `length` of `of` equal shares, from share `first` on."""

    first: int
    of: int
    length: int = 1

    def to_released(self, ours: Sequence[Tensor]) -> Tensor:
        return self.rows_of(ours[0])

    def to_ours(self, released: Tensor, ours: Sequence[Tensor]) -> list[Tensor]:
        whole = ours[0]
        if whole.is_meta:  # the first of the parts that is loaded; the others fill the rest
            whole = torch.empty(whole.shape, dtype=released.dtype, device=released.device)
        self.rows_of(whole).copy_(released)
        return [whole]

    def rows_of(self, whole: Tensor) -> Tensor:
        """The part of our parameter that the released tensor is; it shares its memory."""
        share = len(whole) // self.of
        return whole[self.first * share : (self.first + self.length) * share]


@dataclass(frozen=True)
class Concat(Transform):
    """The released tensor holds the rows of several parameters, one after the other."""

    ours: tuple[str, ...]

    @property
    def our_names(self) -> tuple[str, ...]:
        return self.ours

    def named(self, released: str, ours: Sequence[str]) -> Self:
        return replace(self, released=released, ours=tuple(ours))

    def to_released(self, ours: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(ours))

    def to_ours(self, released: Tensor, ours: Sequence[Tensor]) -> list[Tensor]:
        return list(released.split([len(one) for one in ours]))


@dataclass(frozen=True)
class Ignore:
    """A released tensor that may be in the file and that nothing reads."""

    released: str
    because: str = field(kw_only=True)


Entry: TypeAlias = Transform | Ignore


class KeyMap:
    """The entries of one file of weights, in order: for a parameter the first that matches its name counts.

    Raises ValueError where two entries have the same released name.
    """

    def __init__(self, *entries: Entry):
        names = [entry.released for entry in entries]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"got two entries for {', '.join(twice)}: expected one for each released name")
        self.entries = entries

    def __add__(self, other: "KeyMap") -> "KeyMap":
        """The entries of both, this map's first."""
        return KeyMap(*self.entries, *other.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    @cached_property
    def transforms(self) -> tuple[Transform, ...]:
        """The entries that load something."""
        return tuple(entry for entry in self.entries if isinstance(entry, Transform))

    @property
    def our_names(self) -> tuple[str, ...]:
        """The patterns of our names."""
        return tuple(name for transform in self.transforms for name in transform.our_names)

    def prefixed(self, *, released: str = "", ours: str = "") -> "KeyMap":
        """The same map of a part of a model: every name behind a prefix."""
        entries: list[Entry] = []
        for entry in self.entries:
            if isinstance(entry, Transform):
                entries.append(entry.named(released + entry.released, [ours + name for name in entry.our_names]))
            else:
                entries.append(replace(entry, released=released + entry.released))
        return KeyMap(*entries)

    def filtered(self, keep: Callable[[Entry], bool]) -> "KeyMap":
        """The entries for which `keep` is true."""
        return KeyMap(*filter(keep, self.entries))

    def released_tensors(self, name: str) -> dict[str, Transform]:
        """{released name: transform} of one of our parameters, without placeholders; none where no entry knows it."""
        found: dict[str, Transform] = {}
        shares = 0
        for transform in self.transforms:
            if match := transform.matched(name):
                found[match.released] = match
                if not isinstance(match, Slice):
                    break
                shares += match.length
                if shares == match.of:
                    break
        return found

    def ignores(self, released: str) -> bool:
        """Whether the map says that nothing reads a released tensor."""
        return any(isinstance(entry, Ignore) and matches(entry.released, released) for entry in self.entries)


def renames(names: Mapping[str, str]) -> KeyMap:
    """A map of `Rename`s, from {released name: our name}."""
    return KeyMap(*(Rename(released, ours) for released, ours in names.items()))


def equal_slices(released: Sequence[str], ours: str) -> KeyMap:
    """A map of released tensors that are equal shares of the rows of one parameter, in this order."""
    return KeyMap(*(Slice(name, ours, first, of=len(released)) for first, name in enumerate(released)))


def matches(pattern: str, name: str) -> bool:
    """Whether a name with placeholders can stand for a name."""
    return _match(pattern, name) is not None


def _placeholders(pattern: str) -> int:
    return pattern.count("{}") + pattern.count("{*}")


def _filled(pattern: str, parts: Sequence[str]) -> str:
    return pattern.replace("{*}", "{}").format(*parts)


def _match(pattern: str, name: str) -> re.Match[str] | None:
    # most pairs of a model's names and a map's patterns differ in their first letters, which costs less to see
    return _pattern(pattern).fullmatch(name) if name.startswith(_head(pattern)) else None


@lru_cache(maxsize=4096)
def _head(pattern: str) -> str:
    """What stands before the first placeholder."""
    return pattern.partition("{")[0]


@lru_cache(maxsize=4096)
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+?)"))
