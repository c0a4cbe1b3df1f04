"""JSON files of a checkpoint, and their parts, which know the file and the keys that lead to them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unimm.checkpoint.atomic import name_file
from unimm.checkpoint.contents import CheckpointError, describe_unreadable, is_there

MAX_DEPTH = 50  # of a file's nesting; configs have 5


class JsonSection(dict[str, Any]):
    """An object of a JSON file. file: its path, "" for one that was read from none. above: the keys that lead to it.

    A key that it lacks is a ValueError that names the key and the file.
    """

    def __init__(self, contents: Mapping[str, Any], file: str = "", above: tuple[str, ...] = ()):
        super().__init__(contents)
        self.file = file
        self.above = above

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.file or 'the config'} lacks {self.full_key(key)}: expected the released file")

    def full_key(self, key: str) -> str:
        """A key with those that lead to it, joined by dots."""
        return ".".join((*self.above, key))


def at_place_of(data: Mapping[str, Any], contents: Mapping[str, Any]) -> JsonSection:
    """Contents that stand for those of `data`: messages name the same file and keys."""
    if isinstance(data, JsonSection):
        return JsonSection(contents, data.file, data.above)
    return JsonSection(contents)


def drop_nulls(data: Mapping[str, Any]) -> JsonSection:
    """A part of a file without the keys whose value is null."""
    return at_place_of(data, {key: value for key, value in data.items() if value is not None})


def read_json(path: Path, *, required: bool = False) -> JsonSection:
    """The contents of a config file, or nothing where there is no file. Raises ValueError, which names the file, for
    one that cannot be read or holds no JSON object.

    required: raise ValueError where there is no file.
    """
    if not is_there(path):
        if required:
            raise ValueError(f"no {path.name} in {path.parent}: expected the released one")
        return JsonSection({}, str(path))
    what = describe_unreadable(path)
    if not path.is_file():  # to read what is no file may never end
        raise CheckpointError(f"cannot read {path}: {what or 'it is no file; put the released one there'}")
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {what or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"cannot read {path}: {error}; {what or 'save it in UTF-8, or fetch it again'}"
        ) from error
    except (ValueError, RecursionError) as error:
        message = f"cannot read {path}: {what}" if what else f"{path} is no JSON: {error}; fetch it again"
        raise CheckpointError(message) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {data!r:.80}: expected a JSON object; fetch it again")
    return _with_places(data, str(path), ())


def read_preprocessor_json(folder: Path) -> JsonSection:
    """What a folder says of the preparation of images; empty where it says nothing.

    As transformers has it: in processor_config.json under "image_processor", or else in preprocessor_config.json.
    """
    processor = read_json(folder / "processor_config.json")
    if processor.get("image_processor") is None:
        return read_json(folder / "preprocessor_config.json")
    rules = processor["image_processor"]
    if not isinstance(rules, JsonSection):
        raise CheckpointError(
            f"got image_processor {rules!r:.80} in {processor.file}: expected a mapping; fetch it again"
        )
    return rules


def _with_places(value: Any, file: str, above: tuple[str, ...]) -> Any:
    if len(above) > MAX_DEPTH:
        raise CheckpointError(f"{file} is nested more than {MAX_DEPTH} deep: expected a config; fetch it again")
    if isinstance(value, list):
        return [_with_places(one, file, (*above, str(i))) for i, one in enumerate(value)]
    if not isinstance(value, dict):
        return value
    return JsonSection({key: _with_places(one, file, (*above, key)) for key, one in value.items()}, file, above)


def write_json(path: Path, contents: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write a config file. An OSError names it."""
    with name_file(path):
        path.write_text(json.dumps(contents, indent=indent) + "\n", encoding="utf-8")


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines, letters of every script as they are."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def naming_place(place: Path | Mapping[str, Any]) -> Iterator[None]:
    """Give a ValueError of the body the name of a folder, or of the file of a section, unless it has it already."""
    name = place.file if isinstance(place, JsonSection) else str(place) if isinstance(place, Path) else ""
    try:
        yield
    except ValueError as error:
        if not name or name in str(error):
            raise
        kind = CheckpointError if isinstance(error, CheckpointError) else ValueError
        raise kind(f"{name}: {error}") from error
