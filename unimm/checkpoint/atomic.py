"""Files and folders that are written beside their final path and then moved into it, whole or not at all.

A folder is written into a hidden folder inside it, so that nothing but the folder itself need be writable, and nothing
crosses to another disk. Its files are on the disk before the first one moves. While they move the hidden folder has
another name, by which `is_interrupted` knows a folder whose save was killed just then; the files that they replace are
set aside until all have moved, and come back where one cannot.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# files of tokenizers and processors that a model may have or not, and that are read wherever they are found
OPTIONAL_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("added_tokens.json", "special_tokens_map.json", "preprocessor_config.json", "processor_config.json"),
)
WRITING = ".unimm-writing-"  # begins the name of a folder that is being written
MOVING = ".unimm-moving-"  # and of one that is whole, whose files are being moved into place
OLD = ".unimm-old-"  # and of what holds the files that are being replaced
ALIVE = ".unimm-alive"  # a file that the saving process keeps locked


@contextmanager
def name_file(path: Path, *, within: Sequence[Path] = ()) -> Iterator[None]:
    """Give an OSError of the body that names no file this one's name: a full disk is met when writing, which names none.

    within: folders that the body writes into and moves from; errors then name the files' final paths below `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and not within):
            raise
        found = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes, os.PathLike)) else path
        final = next((path / found.relative_to(one) for one in within if found.is_relative_to(one)), found)
        raise OSError(error.errno, error.strerror, str(final)) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path of the same suffix to write to, which replaces `path` once the body has ended without an error."""
    partial = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        with name_file(path):
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(
    folder: Path,
    *,
    optional_files: Sequence[str] = (),
    optional_folders: Sequence[str] = (),
    weight_names: Iterable[Sequence[str]] = (),
    replace: bool = False,
) -> Iterator[Path]:
    """A hidden folder to write into, whose files move into `folder` once the body has ended without an error.

    optional_files, optional_folders: more names that a model may have or not, beside `OPTIONAL_FILES`. Raises
    ValueError where `folder` holds such files that are not replaced: they are of another model and would be read with
    this one. weight_names: the names that each file of weights may have, the first that is there being read: old files
    that would be read instead of those that are written are deleted, and so are shards of these. replace: whether
    whatever else `folder` holds is deleted instead. An OSError names the file, and leaves the old ones whole.
    """
    folder = folder.expanduser().resolve()  # a link may lead to a folder that is still to be made
    made = _make_directories(folder)
    try:
        with _locked(folder):
            _delete_dead(folder)
            partial = Path(tempfile.mkdtemp(prefix=WRITING, dir=folder))
            # a file of its own: `folder` itself is locked by whoever saves into it, and that may be the body
            alive = _lock(partial / ALIVE, flags=os.O_RDONLY | os.O_CREAT)
        moving, aside = (partial.with_name(partial.name.replace(WRITING, begin)) for begin in (MOVING, OLD))
        try:
            with name_file(folder, within=(partial, moving, aside)):
                yield partial
                if not replace and (
                    stale := stale_files(folder, partial, (*OPTIONAL_FILES, *optional_files), optional_folders)
                ):
                    raise ValueError(
                        f"{folder} holds {', '.join(stale)} of another model, which would be read with this one: "
                        "save into another folder, or remove them first"
                    )
                for path in partial.rglob("*"):
                    _sync(path)
                with _locked(folder):
                    (partial / ALIVE).unlink(missing_ok=True)
                    names = sorted(path.relative_to(partial) for path in partial.rglob("*") if not path.is_dir())
                    others = _others(folder, names) if replace else _superseded(folder, names, weight_names)
                    _move_files(partial, folder, names, others, moving=moving, aside=aside)
            for path in (folder, *made):
                _sync(path)
                _sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            for path in (moving, aside):
                if not _holds_files(path):
                    shutil.rmtree(path, ignore_errors=True)
            os.close(alive)
    finally:
        for path in reversed(made):
            with suppress(OSError):  # it holds what was written, or what another process writes
                path.rmdir()


def is_interrupted(folder: Path) -> bool:
    """Whether a save into a folder was killed, or is at work, between its first file and its last."""
    return any(_holds_files(path) for path in folder.glob(f"{MOVING}*"))


def _holds_files(folder: Path) -> bool:
    return any(not path.is_dir() for path in folder.rglob("*"))


def _make_directories(folder: Path) -> list[Path]:
    """Make a folder and those above it that are not there; returns what was made, the uppermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return missing[::-1]


def _lock(path: Path, *, flags: int = os.O_RDONLY) -> int:
    """An open folder or file that is locked until it is closed, or its process dies."""
    handle = os.open(path, flags)
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = _lock(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _delete_dead(folder: Path) -> None:
    """Delete what killed saves left: what they were writing. What they were moving is marked until the next is done."""
    for path in folder.glob(f"{WRITING}*"):
        if _is_dead(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_dead(folder: Path) -> bool:
    """Whether the process that wrote a hidden folder has ended."""
    try:
        handle = os.open(folder / ALIVE, os.O_RDONLY)
    except FileNotFoundError:
        return not _holds_files(folder)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(handle)


def _move_files(
    partial: Path, folder: Path, names: Sequence[Path], others: Sequence[Path], *, moving: Path, aside: Path
) -> None:
    """Move the files of `partial`, which is called `moving` meanwhile, into `folder`: all, or none where one cannot be
    moved. What they replace, and others, wait in `aside` and are deleted at the end.

    `folder` is locked, so that whatever else is marked as moved or set aside is of saves that were killed.
    """
    old = [*(folder / name for name in names if os.path.lexists(folder / name)), *others]
    dead = [*folder.glob(f"{MOVING}*"), *folder.glob(f"{OLD}*")]
    for name in names:
        _check_target(folder / name)
    with _copies_on_other_disks(partial, folder, names) as copies, _undone_on_error() as moves:
        partial.rename(moving)
        moves.append((partial, moving))
        for path in old:
            place = _place_aside(path, folder, aside)
            path.rename(place)
            moves.append((path, place))
        for name in names:
            source = copies.get(name, moving / name)
            source.replace(folder / name)
            moves.append((source, folder / name))
    for _, place in moves[1 : len(old) + 1]:
        place.unlink()
    for path in (*dead, moving, aside):
        shutil.rmtree(path, ignore_errors=True)
    for parent in sorted({parent for path in others for parent in path.parents}, reverse=True):
        if folder in parent.parents and not any(parent.iterdir()):
            parent.rmdir()
    for parent in {(folder / name).parent for name in names}:
        _sync(parent)


@contextmanager
def _undone_on_error() -> Iterator[list[tuple[Path, Path]]]:
    """A list for what the body has moved, from where and to where; it is moved back, the last first, where that raises."""
    moves: list[tuple[Path, Path]] = []
    is_done = False
    try:
        yield moves
        is_done = True
    finally:
        for source, place in reversed([] if is_done else moves):
            place.rename(source)


@contextmanager
def _copies_on_other_disks(partial: Path, folder: Path, names: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """Copies of the files whose targets lie on another disk than `partial`, beside these, by their names."""
    copies: dict[Path, Path] = {}
    try:
        for name in names:
            if (folder / name).parent.stat().st_dev != partial.stat().st_dev:
                copies[name] = (folder / name).with_name(f"{partial.name}-{name.name}")
                _copy_to_disk(partial / name, copies[name], folder / name)
        yield copies
    finally:
        for place in copies.values():
            place.unlink(missing_ok=True)


def _check_target(target: Path) -> None:
    """Make the folder of a file that is to be moved there. Raises OSError where it could not be moved."""
    if target.is_dir() and not target.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target.parent))


def _copy_to_disk(source: Path, place: Path, target: Path) -> None:
    """Copy a file to a place beside its target, which lies on another disk; deletes what dead saves left there."""
    for begin in (WRITING, OLD):
        for path in target.parent.glob(f"{begin}*-{target.name}"):
            path.unlink()
    copy_file(source, place, name=target)
    _sync(place)


def copy_file(source: Path, target: Path, *, name: Path | None = None) -> None:
    """Copy a file's contents. Raises OSError, which names the file that cannot be written, or else `name`."""
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        # a full disk is met between the two, and python then names the one that is read
        if error.errno is None or (error.filename2 is None and Path(error.filename or target) != target):
            raise
        raise OSError(error.errno, error.strerror, str(name or target)) from error


def _place_aside(path: Path, folder: Path, aside: Path) -> Path:
    """Where an old file of `folder` waits on its own disk: in the hidden folder `aside`, or beside itself."""
    if path.parent.stat().st_dev != folder.stat().st_dev:
        return path.with_name(f"{aside.name}-{path.name}")
    place = aside / path.relative_to(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _others(folder: Path, names: Sequence[Path]) -> list[Path]:
    """The files that a folder holds beside those of these names, but for what other saves are writing."""
    kept = {folder / name for name in names}
    kept |= {parent for path in kept for parent in path.parents}
    return [
        path
        for path in folder.rglob("*")
        if path not in kept
        and not any(part.startswith((WRITING, MOVING, OLD, ALIVE)) for part in path.relative_to(folder).parts)
        and (path.is_symlink() or not path.is_dir())
    ]


def _superseded(folder: Path, names: Sequence[Path], weight_names: Iterable[Sequence[str]]) -> list[Path]:
    """The files of weights in `folder` that would be read instead of those of these names, or are shards of them."""
    written = {str(name) for name in names}
    found: set[Path] = set()
    for group in weight_names:
        first = next((i for i, name in enumerate(group) if name in written), 0)
        found |= {folder / name for name in group[:first]}
        stem = group[first].removesuffix(".index.json").removesuffix(".safetensors")
        found |= set(folder.glob(f"{stem}-[0-9]*-of-[0-9]*.safetensors")) | {folder / f"{stem}.safetensors.index.json"}
    return sorted(path for path in found if str(path.relative_to(folder)) not in written and os.path.lexists(path))


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # a folder above that may not be read
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do it for folders
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def stale_files(
    folder: Path, written: Path, optional_files: Sequence[str], optional_folders: Sequence[str]
) -> list[str]:
    """The optional files of `folder`, relative to it, that the files of `written` do not replace."""
    subfolders = [path for path in written.rglob("*") if path.is_dir()]
    beside = [folder / path.relative_to(written) / name for path in (written, *subfolders) for name in optional_files]
    below = [path for name in optional_folders for path in (folder / name).rglob("*") if path.is_file()]
    found = sorted({path.relative_to(folder) for path in (*beside, *below) if path.exists()})
    return [str(name) for name in found if not (written / name).exists()]
