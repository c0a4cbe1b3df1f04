"""A model's name to a local folder: bundled with the package, a path, or a hub id."""

import difflib
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).parents[1] / "pretrained"
WEIGHT_PATTERN = "*.safetensors"
DOWNLOAD_PATTERNS = ("*.json", WEIGHT_PATTERN, "*.model", "merges.txt")


def bundled_names() -> list[str]:
    """The names of the models that ship inside the package."""
    if not BUNDLED_FOLDER.exists():
        return []
    return sorted(path.name for path in BUNDLED_FOLDER.iterdir() if (path / "config.json").exists())


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    known_names: tuple[str, ...] = (),
    weights: bool = True,
    subfolders: tuple[str, ...] = (),
    more_files: tuple[str, ...] = (),
    non_commercial: Mapping[str, str] | None = None,
) -> Path:
    """The folder of a bundled name, of a path, or of a hub id "owner/name" (downloaded, at `revision`); a Path is a
    path.

    weights: whether they are downloaded, too; configs and tokenizers always are. subfolders: those of a repository that
    are wanted, all unless given. more_files: names beside `DOWNLOAD_PATTERNS`. non_commercial: hub ids whose licence
    forbids commercial use, and that licence, for a warning. Raises ValueError for a name that is none of these, with
    the nearest of `known_names` and the bundled ones.
    """
    path = Path(name).expanduser()
    if isinstance(name, str) and name in bundled_names():
        if path.is_dir():
            warn_shadowed_folder(name)
        return BUNDLED_FOLDER / name
    if path.is_dir():
        return path
    if isinstance(name, Path):
        raise ValueError(
            f"no folder {name}: expected a model's; a bundled name or a hub id is given as a text, no Path"
        )
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        if weights and (licence := (non_commercial or {}).get(str(name))):
            warn_licence(str(name), licence)
        patterns = [*DOWNLOAD_PATTERNS, *more_files]
        return _download(str(name), revision, patterns, weights=weights, subfolders=subfolders)
    names = tuple(dict.fromkeys((*bundled_names(), *known_names)))
    nearest = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4) or list(names)
    raise ValueError(
        f"no model {str(name)!r}: expected a folder, a hub id owner/name, or a bundled name; "
        f"the nearest are {', '.join(nearest)}"
    )


@cache
def warn_shadowed_folder(name: str) -> None:
    """Log a warning, once, that a bundled name is taken although the working folder holds a folder of that name."""
    logger.warning("%s is the bundled model: for the folder of that name write ./%s", name, name)


@cache
def warn_licence(name: str, licence: str) -> None:
    """Log a warning, once, for a hub id whose licence forbids commercial use."""
    logger.warning("%s is not for commercial use: %s", name, licence)


def _download(
    name: str, revision: str | None, patterns: list[str], *, weights: bool, subfolders: tuple[str, ...]
) -> Path:
    # costs half a second to import, and only hub ids need it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not weights:
        patterns = [pattern for pattern in patterns if pattern != WEIGHT_PATTERN]
    patterns = [f"{subfolder}/{pattern}" for subfolder in subfolders for pattern in patterns] or patterns
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        places = subfolders or ("",)
        if weights and not any(any((folder / place).rglob(WEIGHT_PATTERN)) for place in places):
            # an older release, in torch.save's files
            pickled = [f"{place}/*.bin".removeprefix("/") for place in places]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, *pickled]))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        message = f"cannot get {name!r} from the hub: {error}; check the name and the connection, or give a folder"
        raise ValueError(message) from error
