"""Files and folders that are written beside their final path and then moved into it, whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# files of tokenizers and processors that a model may have or not, and that are read wherever they are found
OPTIONAL_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("added_tokens.json", "special_tokens_map.json", "preprocessor_config.json"),
)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path of the same suffix to write to, which replaces `path` once the body has ended without an error."""
    partial = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(
    folder: Path, *, optional_files: Sequence[str] = (), optional_folders: Sequence[str] = (), replace: bool = False
) -> Iterator[Path]:
    """A temporary folder to write into, whose files move into `folder` once the body has ended without an error.

    optional_files, optional_folders: more names that a model may have or not, beside `OPTIONAL_FILES`. Raises
    ValueError where `folder` holds such files that are not replaced: they are of another model and would be read with
    this one. replace: whether the new folder takes the place of the whole old one instead.
    """
    folder = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100 - of "." and "..", the name to write beside
    folder.parent.mkdir(parents=True, exist_ok=True)
    if replace:
        _clean_up(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    # a folder below, since the temporary one can be read by its owner only
    partial = temporary / folder.name
    partial.mkdir()
    try:
        yield partial
        if replace:
            _replace_directory(folder, partial)
            return
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
        shutil.rmtree(temporary)


def _clean_up(folder: Path) -> None:
    """Undo what a crash within an earlier replacement left: a folder half written, or the old one stepped aside."""
    for temporary in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(temporary)
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _replace_directory(folder: Path, partial: Path) -> None:
    """Rename a folder into the place of another."""
    old = folder.with_name(folder.name + ".old")
    # a folder cannot be renamed over a full one: step it aside first
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def stale_files(
    folder: Path, written: Path, optional_files: Sequence[str], optional_folders: Sequence[str]
) -> list[str]:
    """The optional files of `folder`, relative to it, that the files of `written` do not replace."""
    subfolders = [path for path in written.rglob("*") if path.is_dir()]
    beside = [folder / path.relative_to(written) / name for path in (written, *subfolders) for name in optional_files]
    below = [path for name in optional_folders for path in (folder / name).rglob("*") if path.is_file()]
    found = sorted({path.relative_to(folder) for path in (*beside, *below) if path.exists()})
    return [str(name) for name in found if not (written / name).exists()]
