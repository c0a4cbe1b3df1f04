"""A model's name to a local folder: bundled with the package, a path, or a hub id."""

import difflib
import logging
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).parents[1] / "pretrained"
WEIGHT_PATTERN = "*.safetensors"
# the last is a part of UniWorld
DOWNLOAD_PATTERNS = ["*.json", WEIGHT_PATTERN, "*.model", "merges.txt", "task_head_final.pt"]

# hub ids whose licence, as their pages stated it in 2025, forbids commercial use of the weights, or of a part of them
_FLUX, _SANA = "FLUX.1 [dev] Non-Commercial License", "NVIDIA License (NSCL v2-custom)"
NON_COMMERCIAL = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen Research License",
    "black-forest-labs/FLUX.1-dev": _FLUX,
    "LanguageBind/UniWorld-V1": f"{_FLUX}, which its painter was trained from",
    "Efficient-Large-Model/Sana_600M_512px_diffusers": _SANA,
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": _SANA,
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": _SANA,
}


def bundled_names() -> list[str]:
    """The names of the models that ship inside the package."""
    return (
        sorted(path.name for path in BUNDLED_FOLDER.iterdir() if (path / "config.json").exists())
        if BUNDLED_FOLDER.exists()
        else []
    )


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    known_names: tuple[str, ...] = (),
    weights: bool = True,
    subfolders: tuple[str, ...] = (),
) -> Path:
    """The folder of a bundled name, of a path, or of a hub id "owner/name" (downloaded, at `revision`); a Path is a path.

    weights: whether they are downloaded, too; configs and tokenizers always are. parts: the folders of a repository that
    are wanted, all unless given. Raises ValueError for a name that is none of them, with the nearest of `known` and the
    bundled ones.
    """
    path = Path(name).expanduser()
    if isinstance(name, str) and name in bundled_names():
        if path.is_dir():
            warn_shadowed_folder(name)
        return BUNDLED_FOLDER / name
    if path.is_dir():
        return path
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        if weights:
            warn_licence(str(name))
        return _download(str(name), revision, weights, subfolders)
    names = (*bundled_names(), *known_names)
    nearest = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4) or list(names)
    raise ValueError(
        f"no model {str(name)!r}: expected a folder, a hub id owner/name, or a bundled name; the nearest are {', '.join(nearest)}"
    )


@cache
def warn_shadowed_folder(name: str) -> None:
    """Log a warning, once, that a bundled name is taken although the working folder holds a folder of that name."""
    logger.warning("%s is the bundled model: for the folder of that name write ./%s", name, name)


@cache
def warn_licence(name: str) -> None:
    """Log a warning, once, for a hub id whose licence forbids commercial use."""
    if name in NON_COMMERCIAL:
        logger.warning("%s is not for commercial use: %s", name, NON_COMMERCIAL[name])


def _download(name: str, revision: str | None, weights: bool, subfolders: tuple[str, ...]) -> Path:
    # costs half a second to import, and only hub ids need it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = (
            DOWNLOAD_PATTERNS if weights else [pattern for pattern in DOWNLOAD_PATTERNS if pattern != WEIGHT_PATTERN]
        )
        patterns = [f"{part}/{pattern}" for part in subfolders for pattern in patterns] or patterns
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
