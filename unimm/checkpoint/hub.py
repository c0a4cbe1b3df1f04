"""A model's name to a local folder: bundled with the package, a path, or a hub id."""

import difflib
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from unimm.checkpoint.valueless import values_left_out

logger = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).parents[1] / "pretrained"
WEIGHT_PATTERN = "*.safetensors"
DOWNLOAD_PATTERNS = ("*.json", WEIGHT_PATTERN, "*.model", "merges.txt")


def bundled_names() -> list[str]:
    """The names of the models that ship inside the package."""
    if not BUNDLED_FOLDER.exists():
        return []
    return sorted(path.name for path in BUNDLED_FOLDER.iterdir() if (path / "config.json").exists())


def parse_name(name: Any, what: str) -> str | Path:
    """What a model or a part of one is loaded by, as a text or a Path. Raises ValueError for anything else. what: the
    part, for the message."""
    if isinstance(name, os.PathLike) and isinstance(os.fspath(name), str):
        return Path(name)
    if not isinstance(name, str):
        raise ValueError(f"got {name!r:.80} for {what}: expected a folder, a hub id owner/name, or a bundled name")
    return name


def parse_folder(folder: Any) -> Path:
    """The folder to save into. Raises ValueError for what is no path."""
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"got {folder!r:.80} to save into: expected the path of a folder")
    return expand_path(folder)


def expand_path(name: str | os.PathLike[str]) -> Path:
    """A path, with ~ for the home folder. Raises ValueError for the home of a user that is not known."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"got the path {os.fspath(name)}: {error}; write it out") from error


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    known_names: tuple[str, ...] = (),
    weights: bool = True,
    subfolders: tuple[str, ...] = (),
    more_files: tuple[str, ...] = (),
    non_commercial: Mapping[str, str] | None = None,
    offline: bool = False,
) -> Path:
    """The folder of a bundled name, of a path, or of a hub id "owner/name" (downloaded, at `revision`); a Path is a
    path.

    weights: whether they are downloaded, too; configs and tokenizers always are. subfolders: those of a repository that
    are wanted, all unless given. more_files: names beside `DOWNLOAD_PATTERNS`. non_commercial: hub ids whose licence
    forbids commercial use, and that licence, for a warning. offline: take what was downloaded before. Raises ValueError
    for a name that is none of these, with the nearest of `known_names` and the bundled ones.
    """
    name = parse_name(name, "a model")
    path = expand_path(name)
    if isinstance(name, str) and name in bundled_names():
        if path.is_dir():
            warn_shadowed_folder(name)
        return BUNDLED_FOLDER / name
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"got the file {name}: expected the folder that holds a model's files")
    if isinstance(name, Path):
        raise ValueError(
            f"no folder {name}: expected a model's; a bundled name or a hub id is given as a text, no Path"
        )
    if looks_like_hub_id(str(name)):
        if weights and (licence := (non_commercial or {}).get(str(name))):
            warn_licence(str(name), licence)
        patterns = [*DOWNLOAD_PATTERNS, *more_files]
        return _download(str(name), revision, patterns, weights=weights, subfolders=subfolders, offline=offline)
    names = tuple(dict.fromkeys((*bundled_names(), *known_names)))
    nearest = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4) or list(names)
    raise ValueError(
        f"no model {str(name)!r}: expected a folder, a hub id owner/name, or a bundled name; "
        f"the nearest are {', '.join(nearest)}"
    )


def looks_like_hub_id(name: str) -> bool:
    """Whether a name, where no folder has it, is one of a repository: owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


@cache
def warn_shadowed_folder(name: str) -> None:
    """Log a warning, once, that a bundled name is taken although the working folder holds a folder of that name."""
    logger.warning("%s is the bundled model: for the folder of that name write ./%s", name, name)


@cache
def warn_licence(name: str, licence: str) -> None:
    """Log a warning, once, for a hub id whose licence forbids commercial use."""
    logger.warning("%s is not for commercial use: %s", name, licence)


def _download(
    name: str,
    revision: str | None,
    patterns: list[str],
    *,
    weights: bool,
    subfolders: tuple[str, ...],
    offline: bool = False,
) -> Path:
    # costs half a second to import, and only hub ids need it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    weights = weights and not values_left_out()
    if not weights:
        patterns = [pattern for pattern in patterns if pattern != WEIGHT_PATTERN]
    patterns = [f"{subfolder}/{pattern}" for subfolder in subfolders for pattern in patterns] or patterns

    def download(wanted: list[str]) -> Path:
        if offline:
            return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))

    try:
        folder = download(patterns)
        places = subfolders or ("",)
        if weights and not any(any((folder / place).rglob(WEIGHT_PATTERN)) for place in places):
            # an older release, in torch.save's files
            pickled = [f"{place}/*.bin".removeprefix("/") for place in places]
            folder = download([*patterns, *pickled])
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"no folder {name!r} here, and cannot get {name!r} from the hub: {said}; check the name and the connection, "
            "or give a folder"
        ) from error
