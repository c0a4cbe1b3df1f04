"""Config files: JSON to frozen dataclasses and back, by a table of each config's released keys."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import reduce
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    ClassVar,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from typing_extensions import Self

from unimm.checkpoint.atomic import name_file

T = TypeVar("T")


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """The contents of a config file, or nothing where there is no file. Raises ValueError for a file that is no JSON
    object.

    required: raise ValueError where there is no file.
    """
    if required and not path.exists():
        raise ValueError(f"no {path.name} in {path.parent}: expected the released one")
    try:
        data = json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}; fetch it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {data!r:.80}: expected a JSON object; fetch it again")
    return data


def write_json(path: Path, contents: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write a config file. An OSError names it."""
    with name_file(path):
        path.write_text(json.dumps(contents, indent=indent) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class SameAs:
    """A default that is the value of another key of the same file."""

    key: str


@dataclass(frozen=True, kw_only=True)
class JsonLayout:
    """The layout of a config's fields in a released file. A key may be a path, `section.key`. A value of null counts as
    left out.

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

    Raises ValueError for keys that are missing, for values that are not supported, and for those that contradict the
    others.
    """
    data = data.get(layout.section, data) if layout.section else data
    if not isinstance(data, Mapping):
        raise ValueError(f"got {data!r:.80} for {layout.name}: expected a mapping, as in {layout.source}")
    check_data(data, layout)
    keys = _keys(cls, layout)
    if layout.keys is None and (unknown := sorted(data.keys() - {names[0] for names in keys.values()})):
        raise ValueError(f"got {', '.join(unknown)} in {layout.name}: expected some of {', '.join(sorted(keys))}")
    found = {}
    hints = get_type_hints(cls)
    missing = []
    for name, definition in _fields(cls).items():
        if given is not None and name in given:
            found[name] = given[name]
            continue
        value = _value(data, keys.get(name, ()), layout)
        if value is not None:
            found[name] = _decode(value, hints[name])
        elif definition.default is MISSING and definition.default_factory is MISSING:
            if NoneType in get_args(hints[name]):
                found[name] = None
            elif name in keys:
                missing.append(keys[name][0])
    _check_missing(missing, layout)
    config = cls(**found)
    _check_derived(config, data, layout)
    return config


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
        if any(one != expected for one in (got if isinstance(got, list) else [got])):
            raise ValueError(f"got {key} {got!r}, expected {expected!r}, as in {layout.source}")
    _check_missing([key for key in layout.required if _get(data, key) is None], layout)


def _check_missing(keys: Sequence[str], layout: JsonLayout) -> None:
    if keys:
        raise ValueError(f"{layout.name} lacks {', '.join(keys)}: expected {layout.source}")


def _check_derived(config: Any, data: Mapping[str, Any], layout: JsonLayout) -> None:
    for key, path in layout.derived.items():
        got = _get(data, key)
        expected = _encode(attrgetter(path)(config))
        if got is not None and got != expected:
            raise ValueError(
                f"got {key} {got!r}, expected {expected!r} by the rest of {layout.name}: correct one of them"
            )


def _fields(cls: type) -> dict[str, Field]:
    return {one.name: one for one in fields(cls)}


def _keys(cls: type, layout: JsonLayout) -> dict[str, tuple[str, ...]]:
    """Field -> its keys."""
    keys = layout.keys if layout.keys is not None else {name: name for name in _fields(cls)}
    return {name: (key,) if isinstance(key, str) else key for name, key in keys.items()}


def _value(data: Mapping[str, Any], keys: tuple[str, ...], layout: JsonLayout) -> Any:
    """The value of the first of the keys that the file has, or the default of one of them; None without either."""
    values = (*(_get(data, key) for key in keys), *(layout.defaults.get(key) for key in keys))
    value = next((value for value in values if value is not None), None)
    return _value(data, (value.key,), layout) if isinstance(value, SameAs) else value


def _get(data: Mapping[str, Any], path: str) -> Any:
    return _section(data, path).get(path.rpartition(".")[2])


def _section(data: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The mapping that holds the last key of a path; an empty one where the file does not have it."""
    for key in path.split(".")[:-1]:
        inner = data.get(key)
        if inner is not None and not isinstance(inner, Mapping):
            raise ValueError(f"got {key} {inner!r:.80} in the config: expected a mapping")
        data = inner or {}
    return data


def _decode(value: Any, hint: Any) -> Any:
    """A JSON value as a field of that type: lists as tuples, mappings as the nested configs that they describe."""
    if get_origin(hint) in (Union, UnionType):
        inner = [one for one in get_args(hint) if one is not NoneType]
        return _decode(value, inner[0]) if len(inner) == 1 else value
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        types = get_args(hint)
        types = types[:1] * len(value) if types[-1] is Ellipsis else types
        if len(types) != len(value):
            raise ValueError(f"got {value} in the config: expected {len(types)} values")
        return tuple(_decode(*pair) for pair in zip(value, types, strict=True))
    if not isinstance(hint, type):
        return value
    if is_dataclass(hint) and not isinstance(value, Mapping | hint):
        raise ValueError(f"got {value!r:.80} for a {hint.__name__} in the config: expected a mapping")
    if not isinstance(value, Mapping):
        return value
    if issubclass(hint, JsonReadable):
        return hint.from_json(value)
    return read_config(hint, value, JsonLayout(name=hint.__name__)) if is_dataclass(hint) else value


def _encode(value: Any) -> Any:
    """A field as the JSON value that `_decode` reads."""
    if isinstance(value, JsonReadable):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return write_config(value, JsonLayout())
    if isinstance(value, tuple | list):
        return [_encode(one) for one in value]
    return {key: _encode(one) for key, one in value.items()} if isinstance(value, Mapping) else value
