"""Config files: JSON to frozen dataclasses and back, by a table of each config's released keys."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from functools import reduce
from operator import attrgetter
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from typing_extensions import Self

from unimm.checkpoint.json_files import JsonSection, naming_place

T = TypeVar("T")

# limits of a value stand beside its type: `Annotated[int, range(...)]`, `Annotated[str, names]`; those of a plain int
WHOLE_NUMBERS = range(2**31)
PositiveInt = Annotated[int, range(1, 2**31)]
LayerCount = Annotated[int, range(1, 10_001)]  # more would be built for hours, and no release has as many
PositiveFloat = Annotated[float, "positive"]
MAX_FLOAT = sys.float_info.max


@dataclass(frozen=True)
class SameAs:
    """A default that is the value of another key of the same file."""

    key: str


@dataclass(frozen=True, kw_only=True)
class JsonLayout:
    """The layout of a config's fields in a released file. A key may be a path, `section.key`. A value of null counts as
    left out; it is refused where a truth value would be true without it, since null is false to the released code.

    name: of the file in error messages. source: where a right one comes from, for the same messages. keys: field -> its
    key, or several, of which the first that the file has is read and the first is written; a field that is not listed
    is given by the caller, or has the dataclass's default. A field that may be None is None where the file leaves it
    out. keys=None: every field has a key of its own name, and the file may hold no other. defaults: key -> the value
    that a file without it means. fixed: key -> the only supported value; a file without it means that one. A list of it
    in the file is as good. derived: key -> a property of the config that a file may repeat (a path, `vae.stride`), and
    must then repeat rightly. unwritten: keys of `fixed` that a file need not repeat. constants: key -> a value that is
    written and not read. required: keys that the file must have although the class has a default for them, or they are
    fixed. section: where the file may be a larger one, the key of the part that is read. omit_defaults: whether a key
    whose value is its default is not written.
    """

    name: str = "the config"
    source: str = "the released one"
    keys: Mapping[str, str | tuple[str, ...]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, str] = field(default_factory=dict)
    unwritten: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    section: str | None = None
    omit_defaults: bool = False


@runtime_checkable
class JsonReadable(Protocol):
    """A config that reads and writes its own part of a file."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self: ...

    def to_json(self) -> dict[str, Any]: ...


class JsonConfig:
    """A config that one JSON layout describes whole."""

    JSON: ClassVar[JsonLayout] = JsonLayout()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the contents of a file. Raises ValueError for keys that are missing, and for values that are not
        supported."""
        return read_config(cls, data, cls.JSON)

    def to_json(self) -> dict[str, Any]:
        """The contents of the file that `from_json` reads."""
        return write_config(self, self.JSON)


def read_config(
    cls: type[T], data: Mapping[str, Any], layout: JsonLayout, *, given: Mapping[str, Any] | None = None
) -> T:
    """A config out of a file's contents. given: fields that the caller knows better than the file.

    Raises ValueError for keys that are missing, for values of other types than their fields, for those that are not
    supported, and for those that contradict the others; the message names the key and, where it is known, the file.
    """
    data = data.get(layout.section, data) if layout.section and isinstance(data, Mapping) else data
    if not isinstance(data, Mapping):
        raise ValueError(f"got {data!r:.80} for {layout.name}: expected a mapping, as in {layout.source}")
    check_data(data, layout)
    keys = _keys(cls, layout)
    if layout.keys is None and (unknown := sorted(data.keys() - {names[0] for names in keys.values()})):
        raise ValueError(
            f"got {', '.join(unknown)} in {_place(data, layout)}: expected some of {', '.join(sorted(keys))}"
        )
    found = dict(given or {})
    missing = []
    hints = get_type_hints(cls, include_extras=True)
    for name, definition in _fields(cls).items():
        if name in found:
            continue
        value, key = _value(data, keys.get(name, ()), layout)
        default = definition.default
        if hints[name] is bool and (default if value is None else value) is True:
            _refuse_nulls(data, keys.get(name, ()), layout)
        if value is not None:
            found[name] = _decode(value, hints[name], _Spot.of(data, key, layout))
        elif default is MISSING and definition.default_factory is MISSING:
            if NoneType in get_args(hints[name]):
                found[name] = None
            elif name in keys:
                missing.append(keys[name][0])
    _check_missing(missing, data, layout)
    with naming_place(data):
        config = cls(**found)
        _check_derived(config, data, layout)
    return config


def read_value(data: Mapping[str, Any], key: str, hint: Any, default: Any = MISSING, *, layout: JsonLayout) -> Any:
    """One value of a file, of the type that a field with this hint has; the default where the file leaves it out.

    Raises ValueError for another type, and for a missing key without a default. layout: for the messages.
    """
    value = _get(data, key)
    if value is None and default is MISSING:
        _check_missing([key], data, layout)
    if value is None and default is True:
        _refuse_nulls(data, (key,), layout)
    return default if value is None else _decode(value, hint, _Spot.of(data, key, layout))


def read_section(data: Mapping[str, Any], path: str, layout: JsonLayout, *, required: bool = True) -> Mapping[str, Any]:
    """A part of a file, by its path, `section.section`; an empty one where it is not required and not there.

    Raises ValueError where it is missing, or no mapping.
    """
    found = _get(data, path)
    if found is None and required:
        _check_missing([path], data, layout)
    if found is not None and not isinstance(found, Mapping):
        raise _Spot.of(data, path, layout).error(found, "a mapping")
    if isinstance(found, JsonSection):
        return found
    return JsonSection(found or {}, _file(data), tuple(_full_key(data, path).split(".")))


def write_config(config: Any, layout: JsonLayout) -> dict[str, Any]:
    """The file's contents that `read_config` reads."""
    fixed = {key: value for key, value in layout.fixed.items() if key not in layout.unwritten}
    values: dict[str, Any] = {**layout.constants, **fixed}
    values |= {names[0]: _encode(getattr(config, name)) for name, names in _keys(type(config), layout).items()}
    values |= {key: _encode(attrgetter(path)(config)) for key, path in layout.derived.items()}
    data: dict[str, Any] = {}
    for path, value in values.items():
        if layout.omit_defaults and path in layout.defaults and _encode(layout.defaults[path]) == value:
            continue
        *sections, key = path.split(".")
        reduce(lambda inner, section: inner.setdefault(section, {}), sections, data)[key] = value
    return data


def check_data(data: Mapping[str, Any], layout: JsonLayout) -> None:
    """Raise ValueError where a file lacks a required key, or has another value than the only supported one."""
    for key, expected in layout.fixed.items():
        got = _section(data, key).get(key.rpartition(".")[2], expected)
        if got == [] or any(one != expected for one in (got if isinstance(got, list) else [got])):
            file = f" in {data.file}" if isinstance(data, JsonSection) and data.file else ""
            raise ValueError(
                f"got {_full_key(data, key)} {got!r:.80}{file}, expected {expected!r}, as in {layout.source}"
            )
    _check_missing([key for key in layout.required if _get(data, key) is None], data, layout)


def _check_missing(keys: Sequence[str], data: Mapping[str, Any], layout: JsonLayout) -> None:
    if keys:
        lacking = ", ".join(_full_key(data, key) for key in keys)
        raise ValueError(f"{_place(data, layout)} lacks {lacking}: expected {layout.source}")


def _refuse_nulls(data: Mapping[str, Any], keys: tuple[str, ...], layout: JsonLayout) -> None:
    for key in keys:
        if _section(data, key).get(key.rpartition(".")[2], MISSING) is None:
            raise _Spot.of(data, key, layout).error(None, "true or false")


def _check_derived(config: Any, data: Mapping[str, Any], layout: JsonLayout) -> None:
    for key, path in layout.derived.items():
        got = _get(data, key)
        expected = _encode(attrgetter(path)(config))
        if got is not None and got != expected:
            raise ValueError(
                f"got {_full_key(data, key)} {got!r:.80}, expected {expected!r} by the rest of {layout.name}: correct "
                "one of them"
            )


def _fields(cls: type) -> dict[str, Field]:
    return {one.name: one for one in fields(cls)}


def _keys(cls: type, layout: JsonLayout) -> dict[str, tuple[str, ...]]:
    """Field -> its keys."""
    keys = layout.keys if layout.keys is not None else {name: name for name in _fields(cls)}
    return {name: (key,) if isinstance(key, str) else key for name, key in keys.items()}


def _value(data: Mapping[str, Any], keys: tuple[str, ...], layout: JsonLayout) -> tuple[Any, str]:
    """The value of the first of the keys that the file has, or the default of one of them, and its key; None without
    either."""
    values = (*((_get(data, key), key) for key in keys), *((layout.defaults.get(key), key) for key in keys))
    value, key = next((pair for pair in values if pair[0] is not None), (None, ""))
    return _value(data, (value.key,), layout) if isinstance(value, SameAs) else (value, key)


def _get(data: Mapping[str, Any], path: str) -> Any:
    return _section(data, path).get(path.rpartition(".")[2])


def _section(data: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The mapping that holds the last key of a path; an empty one where the file does not have it."""
    for key in path.split(".")[:-1]:
        inner = data.get(key)
        if inner is not None and not isinstance(inner, Mapping):
            raise ValueError(
                f"got {_full_key(data, key)} {inner!r:.80} in {_file(data) or 'the config'}: expected a mapping"
            )
        data = inner or {}
    return data


# ---- where a value stands


def _file(data: Mapping[str, Any]) -> str:
    return data.file if isinstance(data, JsonSection) else ""


def _place(data: Mapping[str, Any], layout: JsonLayout) -> str:
    """The name of a file for messages, with its path where that is known."""
    file = _file(data)
    if not file or file.endswith(f"/{layout.name}"):
        return file or layout.name
    return f"{layout.name}, {file},"


def _full_key(data: Mapping[str, Any], key: str) -> str:
    return data.full_key(key) if isinstance(data, JsonSection) else key


@dataclass(frozen=True)
class _Spot:
    """Where a value stands, for messages."""

    key: str
    file: str

    @classmethod
    def of(cls, data: Mapping[str, Any], key: str, layout: JsonLayout) -> "_Spot":
        return cls(_full_key(data, key), _file(data) or layout.name)

    def error(self, value: Any, expected: str) -> ValueError:
        return ValueError(
            f"got {self.key} {value!r:.80} in {self.file}: expected {expected}; correct it or fetch the file"
        )


# ---- types


def _decode(value: Any, hint: Any, spot: _Spot) -> Any:
    """A JSON value as a field of that type: lists as tuples, mappings as the nested configs that they describe.

    Raises ValueError, which says where it stands and what was expected, for a value of another type.
    """
    origin = get_origin(hint)
    if hint is Any or hint is NoneType:
        return value
    if origin in (Union, UnionType):
        inner = [one for one in get_args(hint) if one is not NoneType]
        assert len(inner) == 1, "a field of one type, or None"
        return _decode(value, inner[0], spot)
    if origin is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            raise spot.error(value, " or ".join(map(repr, get_args(hint))))
        return value
    kind, limits = get_args(hint)[:2] if origin is Annotated else (hint, None)
    if kind in (int, float):
        return _number(value, kind, limits, spot)
    if kind in (bool, str):
        if not isinstance(value, kind):
            raise spot.error(value, "true or false" if kind is bool else "a text")
        if limits is not None and value not in limits:
            raise spot.error(value, f"one of {', '.join(map(repr, limits))}")
        return value
    return _composite(value, kind, spot)


def _number(value: Any, kind: type, limits: Any, spot: _Spot) -> int | float:
    """A number of that kind: as it is, but for a whole one that was written as a fraction, 2.0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        limits = WHOLE_NUMBERS if limits is None else limits
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        if not is_number or not isinstance(whole, int) or whole not in limits:
            least = "a positive whole number" if limits.start == 1 else f"a whole number from {limits.start} on"
            raise spot.error(value, f"{least}, at most {limits.stop - 1}")
        return whole
    # an int may be too large for a float, and nan is within no limits
    if not is_number or not -MAX_FLOAT <= value <= MAX_FLOAT or (limits == "positive" and value <= 0):
        raise spot.error(value, "a positive number" if limits == "positive" else "a finite number")
    return value


def _composite(value: Any, hint: Any, spot: _Spot) -> Any:
    """A list or a mapping."""
    if get_origin(hint) is tuple:
        types = get_args(hint)
        if not isinstance(value, list | tuple):
            raise spot.error(value, "a list")
        types = types[:1] * len(value) if types[-1] is Ellipsis else types
        if len(types) != len(value):
            raise spot.error(value, f"{len(types)} values")
        return tuple(_decode(*pair, spot) for pair in zip(value, types, strict=True))
    is_config = isinstance(hint, type) and is_dataclass(hint)
    if is_config and isinstance(value, hint):
        return value
    if not isinstance(value, Mapping):
        raise spot.error(value, "a mapping")
    if not is_config:
        key_and_value = get_args(hint)
        return {
            key: _decode(one, key_and_value[1], replace(spot, key=f"{spot.key}.{key}")) for key, one in value.items()
        }
    if not isinstance(value, JsonSection):
        value = JsonSection(value, above=tuple(spot.key.split(".")))
    if issubclass(hint, JsonReadable):
        return hint.from_json(value)
    return read_config(hint, value, JsonLayout(name=hint.__name__))


def _encode(value: Any) -> Any:
    """A field as the JSON value that `_decode` reads."""
    if isinstance(value, JsonReadable):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return write_config(value, JsonLayout())
    if isinstance(value, tuple | list):
        return [_encode(one) for one in value]
    return {key: _encode(one) for key, one in value.items()} if isinstance(value, Mapping) else value
