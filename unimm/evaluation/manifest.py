"""Files of JSON lines that only grow: a process that is killed while it writes loses its last line at most."""

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from unimm.checkpoint.atomic import name_file
from unimm.checkpoint.json_files import json_lines


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The rows of a manifest; a last line that was cut off is left out. Raises ValueError, with the line, for one that
    is no JSON object."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is no JSON: {error}; remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            raise ValueError(
                f"{path}, line {number}, holds {row!r:.80}: expected an object with an id; remove the line"
            )
        rows.append(row)
    return rows


class Manifest:
    """A manifest that this process alone appends to, as a context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def __enter__(self) -> Self:
        """Open and lock the file, and cut off a line that was never finished. Raises ValueError where another process
        writes it."""
        with name_file(self.path):
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    self._close()
                    raise ValueError(
                        f"another process writes {self.path}: wait for it, or take another folder or another shard"
                    ) from error
                # some network file systems have no locks
            if self.path.is_file():
                whole = self.path.read_bytes().rfind(b"\n") + 1
                if whole < self.path.stat().st_size:
                    os.ftruncate(self._handle, whole)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows. An OSError, as of a full disk, names the file; rows that were added before are whole."""
        assert self._handle is not None, "append is called within the context"
        left = json_lines(rows).encode()
        with name_file(self.path):
            while left:
                left = left[os.write(self._handle, left) :]

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
