"""Released checkpoints as data; imports nothing heavy, so that lists of releases do not either."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# parts of a model that come from elsewhere: a folder or hub id by name, None for a part that is left out
Components = Mapping[str, str | Path | None]


@dataclass(frozen=True, kw_only=True)
class Release:
    """A released checkpoint: where it is, under which licence, how large it is, what it can do."""

    family: str
    hub: str | None  # None: bundled with the package
    licence: str
    parameters: int
    verbs: tuple[str, ...]
    commercial: bool = True  # whether the licence allows commercial use, in some form: it may name conditions
    file_bytes: int = 0  # of the weights on the hub, from their shapes and dtypes; 0 for a bundled one


@dataclass(frozen=True, kw_only=True)
class PartRelease:
    """A checkpoint that models take a part from.

    what: it is. subfolders: of the repository that are read, all unless given. file_bytes: of the weights there that are
    read, from shapes and dtypes; 0 where the dtype is not known.
    """

    hub: str
    what: str
    licence: str
    parameters: int
    commercial: bool = True
    file_bytes: int = 0
    subfolders: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FamilyFiles:
    """The files of a family beside configs, safetensors and the tokenizer's.

    downloads: names of further files that a hub repository may hold. optional: names that a folder may hold or not; a
    folder with one is another model. optional_folders: likewise. non_commercial: hub ids, of the family or of parts of
    its models, whose licence forbids commercial use of the weights, and that licence.
    """

    downloads: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    optional_folders: tuple[str, ...] = ()
    non_commercial: Mapping[str, str] = field(default_factory=dict)
