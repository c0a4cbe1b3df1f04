"""Folders that are written beside their final path and then moved into it, whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# files of tokenizers and processors that a model may have or not, and that are read wherever they are found
OPTIONAL_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    "preprocessor_config.json",
)


@contextmanager
def atomic_directory(
    folder: Path, *, optional_files: Sequence[str] = (), optional_folders: Sequence[str] = ()
) -> Iterator[Path]:
    """A temporary folder to write into, whose files move into `folder` once the body has ended without an error.

    optional_files, optional_folders: more names that a model may have or not, beside `OPTIONAL_FILES`. Raises
    ValueError where `folder` holds such files that are not replaced: they are of another model and would be read with
    this one.
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
            target = folder / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(partial)


def stale_files(
    folder: Path, written: Path, optional_files: Sequence[str], optional_folders: Sequence[str]
) -> list[str]:
    """The optional files of `folder`, relative to it, that the files of `written` do not replace."""
    subfolders = [path for path in written.rglob("*") if path.is_dir()]
    beside = [folder / path.relative_to(written) / name for path in (written, *subfolders) for name in optional_files]
    below = [path for name in optional_folders for path in (folder / name).rglob("*") if path.is_file()]
    found = sorted({path.relative_to(folder) for path in (*beside, *below) if path.exists()})
    return [str(name) for name in found if not (written / name).exists()]
