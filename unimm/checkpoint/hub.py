"""A model's name to a local folder: bundled with the package, a path, or a hub id."""

import difflib
import logging
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

NANO = Path(__file__).parents[1] / "pretrained"
WEIGHTS = "*.safetensors"
# the last is a part of UniWorld
PATTERNS = ["*.json", WEIGHTS, "*.model", "merges.txt", "task_head_final.pt"]

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


def bundled() -> list[str]:
    """The names of the models that ship inside the package."""
    return sorted(path.name for path in NANO.iterdir() if (path / "config.json").exists()) if NANO.exists() else []


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    known: tuple[str, ...] = (),
    weights: bool = True,
    parts: tuple[str, ...] = (),
) -> Path:
    """The folder of a bundled name, of a path, or of a hub id "owner/name" (downloaded, at `revision`); a Path is a path.

    weights: whether they are downloaded, too; configs and tokenizers always are. parts: the folders of a repository that
    are wanted, all unless given. Raises ValueError for a name that is none of them, with the nearest of `known` and the
    bundled ones.
    """
    path = Path(name).expanduser()
    if isinstance(name, str) and name in bundled():
        if path.is_dir():
            remind_of_folder(name)
        return NANO / name
    if path.is_dir():
        return path
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        if weights:
            remind(str(name))
        return _download(str(name), revision, weights, parts)
    names = (*bundled(), *known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4) or list(names)
    raise ValueError(
        f"no model {str(name)!r}: expected a folder, a hub id owner/name, or a bundled name; the nearest are {', '.join(near)}"
    )


@cache
def remind_of_folder(name: str) -> None:
    """Log a warning, once, that a bundled name is taken although the working folder holds a folder of that name."""
    logger.warning("%s is the bundled model: for the folder of that name write ./%s", name, name)


@cache
def remind(name: str) -> None:
    """Log a warning, once, for a hub id whose licence forbids commercial use."""
    if name in NON_COMMERCIAL:
        logger.warning("%s is not for commercial use: %s", name, NON_COMMERCIAL[name])


def _download(name: str, revision: str | None, weights: bool, parts: tuple[str, ...]) -> Path:
    # costs half a second to import, and only hub ids need it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = PATTERNS if weights else [pattern for pattern in PATTERNS if pattern != WEIGHTS]
        wanted = [f"{part}/{pattern}" for part in parts for pattern in wanted] or wanted
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        places = parts or ("",)
        if weights and not any(any((folder / place).rglob(WEIGHTS)) for place in places):
            # an older release, in torch.save's files
            older = [f"{place}/*.bin".removeprefix("/") for place in places]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*wanted, *older]))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        message = f"cannot get {name!r} from the hub: {error}; check the name and the connection, or give a folder"
        raise ValueError(message) from error
