"""What a file of a checkpoint that cannot be read is instead, as far as its place and its first bytes say."""

import os
from pathlib import Path

# first bytes -> what writes them; the first that fits counts
_SIGNATURES = (
    (b"version https://git-lfs.github.com/", "a Git LFS pointer, not the file that it stands for: run git lfs pull"),
    (b"<!doctype html", "an HTML page, as a site answers instead of the file: download it again"),
    (b"<html", "an HTML page, as a site answers instead of the file: download it again"),
    (b"<?xml", "an XML page, as a site answers instead of the file: download it again"),
    (b"\x1f\x8b", "compressed with gzip: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "compressed with 7-Zip: unpack it"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it"),
    (b"GGUF", "a GGUF file, as llama.cpp reads: fetch the released safetensors"),
)


class CheckpointError(ValueError):
    """Weights that cannot be loaded: a file cut short, keys missing or too many, wrong shapes."""


def is_there(path: Path) -> bool:
    """Whether a folder has a file of this name; a link to nothing is one, and cannot be read."""
    return path.exists() or path.is_symlink()


def describe_unreadable(path: Path) -> str | None:
    """What a file that a reader refused is instead, and what to do; None where nothing more than that can be said."""
    if not path.exists():
        linked = "a link to nothing" if path.is_symlink() else "no such file"
        return f"{linked}; fetch it again"
    if not path.is_file():  # to read a pipe or a device may never end
        return f"a {'folder' if path.is_dir() else 'pipe or a device'}; expected a file"
    if not os.access(path, os.R_OK):
        return "this user may not read it; change its permissions (chmod +r)"
    with path.open("rb") as file:
        first = file.read(64)
    if not first:
        return "it is empty, cut short at its start; fetch it again"
    start = first.lstrip(b"\xef\xbb\xbf \t\r\n")
    for signature, what in _SIGNATURES:
        if start[: len(signature)].lower() == signature.lower():
            return f"it is {what}"
    return None
