"""Folders written beside their place and renamed into it."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# files that a folder may hold or not, and a model is another one with them
OPTIONAL = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("vae_config.json", "ae.safetensors", "vit_config.json", "llm_config.json", "preprocessor_config.json"),
    *("task_head_final.pt", "task_head_final.safetensors"),
)
OPTIONAL_FOLDERS = ("siglip", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """A folder to write into; its files move into `folder` only when the body has ended well.

    Raises ValueError where `folder` holds files of another model that would be read together with these.
    """
    folder = folder.expanduser()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        if stale := stale_files(folder, partial):
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


def stale_files(folder: Path, written: Path) -> list[str]:
    """What a folder holds that would be read together with the files of `fresh`, which do not replace it."""
    subfolders = [path for path in written.rglob("*") if path.is_dir()]
    beside = [folder / path.relative_to(written) / name for path in (written, *subfolders) for name in OPTIONAL]
    below = [path for name in OPTIONAL_FOLDERS for path in (folder / name).rglob("*") if path.is_file()]
    found = sorted({path.relative_to(folder) for path in (*beside, *below) if path.exists()})
    return [str(name) for name in found if not (written / name).exists()]
