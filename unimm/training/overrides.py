"""Values of a recipe set from outside: `key=value`, where the key is a path with dots and the value is YAML."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_type_hints

import yaml

from unimm.training.recipe_keys import RecipeLoader, suggestion

# sections whose keys nothing checks when the recipe is read
CLOSED = ("model",)


@dataclass(frozen=True)
class Setting:
    """One `key=value`."""

    path: str
    value: Any
    text: str

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Raises ValueError for another form, and for a value that is no YAML."""
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise ValueError(f"got --set {text!r}: expected key=value, as in --set steps=100")
        try:
            # a subclass of the safe loader
            return cls(path, yaml.load(value, Loader=RecipeLoader), text)
        except yaml.YAMLError as error:
            raise ValueError(f"got --set {text!r}, whose value is no YAML: {error}") from error


def apply_overrides(recipe: Mapping[str, Any], kind: type, settings: Sequence[str]) -> dict[str, Any]:
    """A recipe's contents, which a dataclass is read from, with each `key=value` set, the later ones over the earlier.

    A key with dots in it is found where the recipe has it: `options.tasks.draw.one`. New keys may be set where their
    names are checked when the recipe is read, but not in `model`. Raises ValueError, with the key that is nearest, for an
    unknown one.
    """
    contents = copy.deepcopy(dict(recipe))
    for text in settings:
        setting = Setting.parse(text)
        _set(contents, kind, setting, setting.path)
    return contents


def _set(section: dict[str, Any], kind: Any, setting: Setting, path: str) -> None:
    """Set the value under a path in a section of this type; None for one that takes no new keys."""
    names = {one.name for one in fields(kind)} if is_dataclass(kind) else set()
    # the longest key that the path begins with: keys may have dots
    known = [key for key in {*section, *names} if isinstance(key, str) and f"{path}.".startswith(f"{key}.")]
    first = path.split(".", 1)[0]
    if known:
        key = max(known, key=len)
    elif kind is None or is_dataclass(kind) or (path != first and _value_kind(kind, first) is Any):
        keys = [str(one) for one in {*section, *names}]
        hint = suggestion(path if any("." in one for one in keys) else first, keys)
        raise ValueError(f"got --set {setting.text!r}, but there is no {path!r} to set{hint}")
    else:
        key = first
    rest = path[len(key) + 1 :]
    if not rest:
        section[key] = setting.value
        return
    if section.get(key) is None:
        section[key] = {}
    if not isinstance(section[key], dict):
        raise ValueError(f"got --set {setting.text!r}, but {key} is {section[key]!r:.80}: set {key} itself")
    _set(section[key], None if key in CLOSED else _value_kind(kind, key), setting, rest)


def _value_kind(kind: Any, key: str) -> Any:
    """The type of what stands under a key of a section or a mapping; Any where it is not known."""
    if kind is None:
        return None
    if is_dataclass(kind):
        found = get_type_hints(kind)[key]
        # of an optional section the section
        return (
            next((one for one in get_args(found) if is_dataclass(one)), found)
            if isinstance(found, UnionType)
            else found
        )
    return get_args(kind)[1] if len(get_args(kind)) == 2 else Any
