"""Folders written beside their place and renamed into it."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# files of tokenizers and processors that a folder may hold or not; a model is another one with them
OPTIONAL_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    "preprocessor_config.json",
)


@contextmanager
def atomic_directory(
    folder: Path, *, optional_files: Sequence[str] = (), optional_folders: Sequence[str] = ()
) -> Iterator[Path]:
    """A folder to write into; its files move into `folder` only when the body has ended well.

    optional_files, optional_folders: names, beside `OPTIONAL_FILES`, that a folder may hold or not. Raises ValueError where
    `folder` holds such files of another model, which would be read together with these.
    """
    folder = folder.expanduser()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        if stale := stale_files(folder, partial, (*OPTIONAL_FILES, *optional_files), optional_folders):
            raise ValueError(
                f"{folder} holds {', '.join(stale)} of another model, which would be read with this one: "
                "save into another folder, or remove them first"
            )
        folder.mkdir(exist_ok=True)
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            place = folder / path.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    finally:
        shutil.rmtree(partial)


def stale_files(
    folder: Path, written: Path, optional_files: Sequence[str], optional_folders: Sequence[str]
) -> list[str]:
    """What a folder holds that would be read together with the files of `fresh`, which do not replace it."""
    subfolders = [path for path in written.rglob("*") if path.is_dir()]
    beside = [folder / path.relative_to(written) / name for path in (written, *subfolders) for name in optional_files]
    below = [path for name in optional_folders for path in (folder / name).rglob("*") if path.is_file()]
    found = sorted({path.relative_to(folder) for path in (*beside, *below) if path.exists()})
    return [str(name) for name in found if not (written / name).exists()]
